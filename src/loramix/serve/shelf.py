"""The library that a server works on: it takes adapters in, deletes them, and keeps corrections."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from loramix.folders import POCKET_LIBRARY, default_library, own_library
from loramix.formats.aside import aside


def working_library(base: str) -> Path:
    """Your own library; for pocket, whose library comes with the package, a copy of that.

    The copy is in your data folder, under a digest of what was copied: a package with other
    adapters gets another one. What a server changes there is there at its next start.
    """
    found = default_library(base)
    if found != POCKET_LIBRARY:
        return found
    place = own_library().parent / f"pocket-{_digest(found)}"
    if not place.is_dir():
        with aside(place, replace=True) as new:
            shutil.copytree(found, new)
    return place


def _digest(library: Path) -> str:
    """Of the files of its adapters and router, not of corrections, which lie beside them."""
    found = hashlib.sha256()
    for file in sorted(library.glob("*/*")):
        found.update(f"{file.relative_to(library)}\0".encode())
        found.update(file.read_bytes())
    return found.hexdigest()[:8]
