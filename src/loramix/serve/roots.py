"""Paths that clients name: they are read inside the configured folders only."""

from __future__ import annotations

from pathlib import Path

from loramix.errors import BadRequest


def inside(path: str, roots: tuple[Path, ...], key: str) -> Path:
    """A client's path, if it lies in a root; what it links to must, too. BadRequest if not."""
    if "\0" not in path:
        for root in roots:
            place = (root / path).resolve()
            if place.is_relative_to(root.resolve()) and place.exists():
                return place
    raise BadRequest(
        f"{key} is {path[:200]!r}, which is not inside this server's roots; put it there, or "
        f"upload it."
    )
