"""One change of a saved router after the other, whichever process or thread makes it.

Who reads a router, changes it and saves it, does all three inside `changing`; else the last to
save would undo what others saved meanwhile. Readers need no turn (saved.py). A change that takes
long, as a refit does, is worked out outside, and takes its turn only to look whether the router is
still the one it began with (refit.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loramix.errors import RouteError


@contextmanager
def changing(folder: Path) -> Iterator[None]:
    """Wait for the turn to change the router of a folder, which need not exist yet.

    The folder itself is replaced by a save, so the lock is on the one it lies in. It goes with the
    process. It is not reentrant. Raises RouteError if there can be no such folder. On Windows,
    which cannot lock like this, nobody waits.
    """
    if os.name == "nt":
        yield
        return
    import fcntl

    around = Path(os.path.abspath(folder)).parent
    try:
        around.mkdir(parents=True, exist_ok=True)
        place = os.open(around, os.O_RDONLY)
    except OSError as error:
        raise RouteError(
            f"Cannot change the router {folder}: {error.strerror or error}."
        ) from error
    try:
        fcntl.flock(place, fcntl.LOCK_EX)
        yield
    finally:
        os.close(place)
