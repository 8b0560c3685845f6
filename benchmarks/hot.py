"""Requests for an adapter that is not in memory, while eight others decode."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

from loramix.adapter import Adapter
from loramix.engine import Request, Sampling
from loramix.engine.local import LocalEngine
from loramix.library import Library
from loramix.mix import Mix

SETTLED = 14  # steps, after which the layers suit the batch
AFTER = 4  # steps that are watched after each answer
MOST = 13  # steps that an ask takes on average, so that the others decode all the while


class Told(Library):
    """Tells when a file has been read."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.tell: Callable[[], object] = bool

    def load(self, name: str) -> Adapter:
        adapter = super().load(name)
        self.tell()
        return adapter


@dataclass(frozen=True)
class Stalls:
    """What requests for an adapter cost, in steps; times are over the median of all steps."""

    most_steps: int  # from the file being read to the adapter's first token, worst of all
    slowest: float  # of all steps
    typical: float  # the slowest step around each request, median over them


def stalls(
    engine: LocalEngine, library: Told, decode: Callable[[int], object], names: Sequence[str]
) -> Stalls:
    """Ask for each of these while `decode(tokens)` goes on; those not in memory have to be read.

    The request for it has a prompt of one token, so that a step with it is as others are but for a
    row. Steps are told apart by the pre-hook of the first layer.
    """
    starts: list[float] = []
    layer = engine.base.model.model.layers[0]
    hook = layer.register_forward_pre_hook(lambda *_: starts.append(time.perf_counter()))
    others = threading.Thread(target=decode, args=(SETTLED + MOST * len(names),))
    others.start()
    _reach(starts, SETTLED)
    first, waits, around = len(starts), [], []
    for name in names:
        begun = len(starts)
        read = [begun]
        library.tell = lambda read=read: read.append(len(starts))
        engine.generate([Request((7,), Mix({name: 1.0}), Sampling(temperature=0, max_tokens=1))])
        waits.append(len(starts) - read[-1])
        _reach(starts, len(starts) + AFTER)
        around.append((begun - 1, len(starts) - 1))
    gaps = [after - before for before, after in pairwise(starts)]
    if not others.is_alive():
        raise RuntimeError(f"The others were done after {len(starts)} steps; expected more.")
    others.join()
    hook.remove()
    usual = median(gaps[first:])
    slowest = [max(gaps[begin:end]) / usual for begin, end in around]
    return Stalls(max(waits), max(gaps[first:]) / usual, median(slowest))


def _reach(starts: Sequence[float], count: int) -> None:
    while len(starts) < count:
        time.sleep(0.005)
