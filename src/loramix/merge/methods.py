"""All merge methods by name: importing this registers them."""

from __future__ import annotations

from loramix.merge import coordinates, cores, entries, lego, regmean, scalars
from loramix.merge.registry import METHODS, Method, find

__all__ = [
    "METHODS",
    "Method",
    "coordinates",
    "cores",
    "entries",
    "find",
    "lego",
    "regmean",
    "scalars",
]
