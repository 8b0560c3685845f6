"""The first files of a base on their way to memory while torch is still being loaded."""

from __future__ import annotations

import os
from pathlib import Path
from threading import Thread

MOST = 2 << 30  # bytes; a disk gives no more in the seconds that loading torch takes


def read_ahead(folder: Path) -> None:
    """Have the kernel read files of weights, as far as there is memory that nobody uses."""
    if hasattr(os, "posix_fadvise"):
        Thread(target=_read, args=(folder,), daemon=True).start()


def _read(folder: Path) -> None:
    left = min(MOST, os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            size = min(left, path.stat().st_size)
            os.posix_fadvise(file.fileno(), 0, size, os.POSIX_FADV_WILLNEED)
        left -= size
        if left <= 0:
            return
