"""Builds a folder or a file beside its place and renames it there when it is whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from loramix.errors import AdapterError


@contextmanager
def aside(place: Path, *, replace: bool = False) -> Iterator[Path]:
    """A path to build at; it becomes `place` if the block ends well, else it is gone.

    The path does not exist yet. With `replace`, what was at `place` is removed only after the new
    one took its name. Raises AdapterError if `place` is taken or cannot be written.
    """
    place = Path(os.path.abspath(place))  # "." has no name to write beside
    if place.exists() and not replace:
        raise AdapterError(f"{place} exists; remove it first, or ask for it to be replaced.")
    new, old = (place.parent / f".{place.name}.{kind}-{uuid4().hex[:8]}" for kind in ("new", "old"))
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        yield new
        if place.exists():
            place.rename(old)
        new.rename(place)
    except OSError as error:
        raise AdapterError(f"Cannot write {place}: {error.strerror or error}.") from error
    finally:
        if old.exists() and not place.exists():
            old.rename(place)
        _remove(new)
        _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()
