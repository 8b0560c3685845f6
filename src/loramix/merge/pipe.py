"""Read, fold, write, hash: a tensor stays on one thread, and every core has a tensor of its own.

Nothing is handed from thread to thread, so a block is still in its core's cache when it is rounded,
written and hashed. There is a thread more than cores, as one of them waits for the disk. Memory is
a block for each thread, whatever the size of the model.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from loramix.errors import MergeError
from loramix.merge.files import Slot
from loramix.merge.journal import CHUNK
from loramix.merge.output import Output, Room
from loramix.merge.stored import Stored, bytes_of, read_into
from loramix.threads import single_threaded

LANES = 8  # threads at most: a disk has no more to give
AHEAD = 16 << 20  # bytes that the kernel is asked to have read before they are needed


class Folded(Protocol):
    """What is done to the rows of one tensor."""

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Rows to fold at a time, in order; together all there are."""

    def add(self, start: int, rows: Tensor) -> None:
        """Add the update to rows [N, D] of the base in float32, in place."""

    def exact(self, start: int, rows: Tensor) -> Tensor | None:
        """Rows of the base with the update, in float64; None where there are no factors."""


@dataclass(frozen=True, slots=True)
class Way:
    """A tensor, the file it is read from, and the file and the offset it is written to."""

    stored: Stored
    source: int
    target: Output
    offset: int


@dataclass(frozen=True, slots=True)
class Written:
    """A tensor in its file; `worst` is the largest error of a row that was read back."""

    name: str
    sha256: str
    worst: float


def run(
    slots: Iterable[Slot],
    files: Mapping[str, Output],
    fold: Callable[[Stored], Folded | None],
    done: Callable[[Written], None],
) -> None:
    """Write every slot into its open file; `fold` gives None for what is copied as it is.

    `done` hears of each tensor on the caller's thread. Raises BaseError, MergeError: the first
    that came up.
    """
    ordered = sorted(slots, key=lambda slot: -slot.stored.size_bytes)  # lanes end together
    with ExitStack() as stack, single_threaded() as lanes:
        sources = {path: _opened(path, stack) for path in {slot.stored.file for slot in ordered}}
        pool = stack.enter_context(ThreadPoolExecutor(min(lanes + 1, LANES)))
        stack.callback(pool.shutdown, cancel_futures=True)
        ways = (Way(s.stored, sources[s.stored.file], files[s.file], s.offset) for s in ordered)
        for written in as_completed([pool.submit(_write, way, fold) for way in ways]):
            done(written.result())


def _opened(path: Path, stack: ExitStack) -> int:
    file = os.open(path, os.O_RDONLY)
    stack.callback(os.close, file)
    return file


def _write(way: Way, fold: Callable[[Stored], Folded | None]) -> Written:
    with torch.inference_mode():
        folded = fold(way.stored)
        return _copy(way) if folded is None else _fold(way, folded)


def _copy(way: Way) -> Written:
    state, size = hashlib.sha256(), way.stored.size_bytes
    room = Room(min(CHUNK, size))
    for start in range(0, size, CHUNK):
        place = way.offset + start
        data = room.at(place, (min(CHUNK, size - start),), torch.uint8)
        _read(way, start, data)
        way.target.write(data, place)
        state.update(bytes_of(data))
    return Written(way.stored.name, state.hexdigest(), 0.0)


def _fold(way: Way, folded: Folded) -> Written:
    stored, state, worst = way.stored, hashlib.sha256(), 0.0
    blocks = list(folded.blocks())
    most = max(stop - start for start, stop in blocks)
    room, single = Room(most * stored.row_bytes), torch.empty(most, *stored.shape[1:])
    for start, stop in blocks:
        place, raised = way.offset + start * stored.row_bytes, single[: stop - start]
        rows = room.at(place, tuple(raised.shape), stored.dtype)
        _read(way, start * stored.row_bytes, rows)
        before = rows[:1].clone()
        raised.copy_(rows)
        folded.add(start, raised)
        _check_range(stored, raised)
        rows.copy_(raised)
        way.target.write(rows, place)
        state.update(bytes_of(rows))
        exact = folded.exact(start, before)
        expected = raised[:1].double() if exact is None else exact
        worst = max(worst, _read_back(way, place, expected, before))
    return Written(stored.name, state.hexdigest(), worst)


def _read(way: Way, first: int, out: Tensor) -> None:
    """Fill a tensor with the bytes from `first` on, and let the kernel have their pages back."""
    size = out.numel() * out.itemsize
    _announce(way, first + size)
    read_into(way.source, out, way.stored.offset + first)
    forget(way.source, way.stored.offset + first, size)


def _announce(way: Way, start: int) -> None:
    """Have the kernel read what comes next of a tensor, while this thread does something else."""
    size = min(AHEAD, way.stored.size_bytes - start)
    if size > 0 and hasattr(os, "posix_fadvise"):
        os.posix_fadvise(way.source, way.stored.offset + start, size, os.POSIX_FADV_WILLNEED)


def forget(file: int, start: int, size: int) -> None:
    """Let the kernel reuse the pages of a range, rather than find new ones."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, start, size, os.POSIX_FADV_DONTNEED)


def _check_range(stored: Stored, rows: Tensor) -> None:
    low, high = torch.aminmax(rows)
    limit = torch.finfo(stored.dtype).max
    if not (-limit <= low and high <= limit):
        raise MergeError(
            f"{stored.name} leaves the range of {stored.dtype} or is not a number: use smaller "
            f"weights, or check the base."
        )


def _read_back(way: Way, place: int, exact: Tensor, before: Tensor) -> float:
    """The error of the first row of a block, as it is in the file now."""
    found = torch.empty_like(before)
    read_into(way.target.file, found, place)
    error = in_last_places(found, exact, before)
    if error > 0.51:
        raise MergeError(
            f"{way.stored.name} was read back with an error of {error:.2f} in the last place, "
            f"where one rounding makes 0.5; check the disk and the memory, and merge again."
        )
    return error


def in_last_places(found: Tensor, exact: Tensor, before: Tensor) -> float:
    """The largest |found - exact| in units of the last place, but for the noise of a float32 sum.

    A perfect rounding makes 0.5 of it; `before` is the base.
    """
    limits = torch.finfo(found.dtype)
    spacing = torch.exp2(exact.abs().clamp(min=limits.tiny).log2().floor()) * limits.eps
    noise = 2e-6 * ((exact - before.double()).abs().amax(1, keepdim=True) + exact.abs())
    return float((((found.double() - exact).abs() - noise) / spacing).max())
