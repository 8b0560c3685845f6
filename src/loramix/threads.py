"""Work beside other work: with one thread, and behind those who decode.

torch gives every loop over 32768 numbers to all cores and waits for the last one. Where the cores
have other work, as while an engine decodes or another program runs, each of a hundred small loops
waits for its turn there: an adapter that one thread reads in a tenth of a second took seven.

An engine computes with all cores, which wait for each other hundreds of times a step: whoever takes
one of them for a tenth of a second takes all.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from threading import Thread, get_native_id
from typing import TypeVar

import torch

BEHIND = 8  # nice levels: a sixth of the time of a thread that is not behind
T = TypeVar("T")


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


def aside(call: Callable[[], T]) -> T:
    """Do this in a thread of its own, behind the others where the system can tell; its result.

    Linux alone has priorities of threads, and who has lowered its own may not raise it again.
    """
    done: Future[T] = Future()

    def run() -> None:
        try:
            if sys.platform == "linux":
                usual = os.getpriority(os.PRIO_PROCESS, 0)
                os.setpriority(os.PRIO_PROCESS, get_native_id(), usual + BEHIND)
            with single_threaded():
                done.set_result(call())
        except BaseException as error:
            done.set_exception(error)

    Thread(target=run, name="loramix-aside", daemon=True).start()
    return done.result()
