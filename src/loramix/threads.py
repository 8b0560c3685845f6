"""Work that more threads would only slow down.

torch gives every loop over 32768 numbers to all cores and waits for the last one. Where the cores
have other work, as while an engine decodes or another program runs, each of a hundred small loops
waits for its turn there: an adapter that one thread reads in a tenth of a second took seven.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def single_threaded() -> Iterator[int]:
    """Torch computes with one thread for the calling one meanwhile; how many it had.

    A thread that computes for the first time meanwhile has one for good, so those who want more
    say so (`engine/core.py`), and one that has one changes nothing for the others.
    """
    count = torch.get_num_threads()
    if count == 1:
        yield count
        return
    torch.set_num_threads(1)
    try:
        yield count
    finally:
        torch.set_num_threads(count)
