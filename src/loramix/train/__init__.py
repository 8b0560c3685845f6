"""Rows of text become the pairs of an expert, learned through the layers that will serve it."""
