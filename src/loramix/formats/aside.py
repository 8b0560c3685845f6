"""Builds a folder beside its place and renames it there when it is whole."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from loramix.errors import AdapterError


@contextmanager
def aside(place: Path, *, replace: bool = False) -> Iterator[Path]:
    """A path to build a folder at; it becomes `place` if the block ends well, else it is gone.

    The path does not exist yet. Raises AdapterError if `place` exists and is not to be replaced;
    with `replace` what was there is removed only after the new folder took its name.
    """
    if place.exists() and not replace:
        raise AdapterError(f"{place} exists; remove it first, or ask for it to be replaced.")
    place.parent.mkdir(parents=True, exist_ok=True)
    new, old = (place.parent / f".{place.name}.{kind}-{uuid4().hex[:8]}" for kind in ("new", "old"))
    try:
        yield new
        if place.exists():
            place.rename(old)
        new.rename(place)
    except BaseException:
        if old.exists() and not place.exists():
            old.rename(place)
        raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
