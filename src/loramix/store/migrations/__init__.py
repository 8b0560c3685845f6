"""The steps from each form of the tables to the next, in order; none is ever changed."""
