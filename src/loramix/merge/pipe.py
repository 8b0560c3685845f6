"""Read ahead, fold, write: three threads and a ring of buffers, whatever the size of the model."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

import torch
from torch import Tensor

from loramix.errors import MergeError
from loramix.merge.checkpoint import Stored, read_into
from loramix.merge.files import Slot
from loramix.merge.journal import CHUNK, Staging, sha256_of

BUFFERS = 4  # blocks that are being read, folded or written


class Folding(Protocol):
    """What is done to the rows of the tensors it touches."""

    def touches(self, stored: Stored) -> bool: ...

    def blocks(self, stored: Stored) -> Iterator[tuple[int, int]]:
        """Rows to fold at a time."""

    def add(self, stored: Stored, start: int, rows: Tensor) -> None:
        """Add the update to rows [N, D] of the base in float32, in place."""

    def exact(self, stored: Stored, start: int, rows: Tensor) -> Tensor | None:
        """Rows of the base with the update, in float64; None where there are no factors."""


@dataclass(frozen=True, slots=True)
class Block:
    """Rows of a folded tensor on their way; `buffer` is theirs until they are written."""

    slot: Slot
    start: int
    buffer: Tensor  # bytes
    rows: Tensor  # [N, D] in the stored dtype, in the buffer


@dataclass(frozen=True, slots=True)
class Witness:
    """What the first two rows of a block must be, once they are read back from the disk."""

    before: Tensor  # [2, D], the base
    exact: Tensor  # [2, D], float64


class Pipe:
    """Reads ahead, folds, writes: each in a thread of its own, over a ring of buffers."""

    def __init__(self, aside: Staging, fold: Folding, files: Mapping[str, int]) -> None:
        self.hashes: dict[str, str] = {}
        self.worst = 0.0
        self._aside, self._fold, self._files = aside, fold, files
        self._sources: dict[Path, FileIO] = {}
        self._free: SimpleQueue[Tensor] = SimpleQueue()
        self._single = torch.empty(0)
        self._state: Any = None
        self._reader, self._writer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)

    def __enter__(self) -> Pipe:
        return self

    def __exit__(self, *_: object) -> None:
        for _buffer in range(BUFFERS):  # after an error the reader may wait for a buffer
            self._free.put(torch.empty(0, dtype=torch.uint8))
        self._reader.shutdown(wait=True, cancel_futures=True)
        self._writer.shutdown(wait=True, cancel_futures=True)
        for file in self._sources.values():
            file.close()

    def run(self, slots: list[Slot]) -> None:
        """All of these, in order."""
        self._open(slots)
        ahead: deque[Future[Block] | Slot] = deque()
        behind: deque[Future[None]] = deque()
        for read in self._reads(slots):
            ahead.append(read)
            if len(ahead) > BUFFERS - 2:
                self._next(ahead, behind)
        while ahead:
            self._next(ahead, behind)
        for written in behind:
            written.result()

    def _next(self, ahead: deque[Future[Block] | Slot], behind: deque[Future[None]]) -> None:
        item = ahead.popleft()
        if isinstance(item, Slot):
            behind.append(self._writer.submit(self._copy, item))
        else:
            block = item.result()
            witness = self._add(block)
            behind.append(self._writer.submit(self._put, block, witness))
        while behind and (behind[0].done() or len(behind) > BUFFERS):
            behind.popleft().result()

    def _reads(self, slots: list[Slot]) -> Iterator[Future[Block] | Slot]:
        """What to do next: a tensor to copy, or a block that is being read."""
        for slot in slots:
            if not self._fold.touches(slot.stored):
                yield slot
                continue
            for start, stop in self._fold.blocks(slot.stored):
                yield self._reader.submit(self._read, slot, start, stop)

    def _open(self, slots: list[Slot]) -> None:
        largest = 0
        for slot in slots:
            if slot.stored.file not in self._sources:
                self._sources[slot.stored.file] = slot.stored.file.open("rb", buffering=0)
            if self._fold.touches(slot.stored):
                rows = max(stop - start for start, stop in self._fold.blocks(slot.stored))
                largest = max(largest, rows * slot.stored.row_bytes)
        for _ in range(BUFFERS):
            self._free.put(torch.empty(largest, dtype=torch.uint8))

    def _read(self, slot: Slot, start: int, stop: int) -> Block:
        stored, buffer = slot.stored, self._free.get()
        raw = buffer[: (stop - start) * stored.row_bytes]
        file = self._sources[stored.file]
        place = stored.offset + start * stored.row_bytes
        read_into(file, raw, place)
        forget(file.fileno(), place, len(raw))
        rows = raw.view(stored.dtype).view(stop - start, -1)
        return Block(slot, start, buffer, rows)

    def _add(self, block: Block) -> Witness:
        """Fold the update in, in float32, and round once into the block's own buffer."""
        before = block.rows[:2].clone()
        exact = self._fold.exact(block.slot.stored, block.start, before)
        if self._single.numel() < block.rows.numel():
            self._single = torch.empty(block.rows.numel())
        single = self._single[: block.rows.numel()].view(block.rows.shape)
        single.copy_(block.rows)
        self._fold.add(block.slot.stored, block.start, single)
        low, high = torch.aminmax(single)
        limit = torch.finfo(block.rows.dtype).max
        if not (-limit <= low and high <= limit):
            raise MergeError(
                f"{block.slot.stored.name} leaves the range of {block.rows.dtype} or is not a "
                f"number: use smaller weights, or check the base."
            )
        block.rows.copy_(single)
        return Witness(before, single[:2].double() if exact is None else exact)

    def _put(self, block: Block, witness: Witness) -> None:
        stored, file = block.slot.stored, self._files[block.slot.file]
        place = block.slot.offset + block.start * stored.row_bytes
        try:
            raw = block.buffer.numpy().data[: len(block.rows) * stored.row_bytes]
            write_all(file, raw, place)
            if block.start == 0:
                self._state = hashlib.sha256()
            self._state.update(raw)
        finally:
            self._free.put(block.buffer)
        self._check(stored, os.pread(file, 2 * stored.row_bytes, place), witness)
        if block.start + len(block.rows) == stored.shape[0]:
            self._done(stored, self._state.hexdigest())

    def _check(self, stored: Stored, raw: bytes, witness: Witness) -> None:
        """Compare what is in the file with the same sum in float64."""
        size = witness.exact.numel() * stored.dtype.itemsize
        found = torch.frombuffer(bytearray(raw[:size]), dtype=stored.dtype)
        error = in_last_places(found.view_as(witness.exact), witness.exact, witness.before)
        self.worst = max(self.worst, error)
        if error > 0.51:
            raise MergeError(
                f"{stored.name} was read back with an error of {error:.2f} in the last place, "
                f"where one rounding makes 0.5; check the disk and the memory, and merge again."
            )

    def _copy(self, slot: Slot) -> None:
        stored, file = slot.stored, self._sources[slot.stored.file].fileno()
        copy_range(file, stored.offset, self._files[slot.file], slot.offset, stored.size_bytes)
        self._done(stored, sha256_of(file, stored.offset, stored.size_bytes))

    def _done(self, stored: Stored, sha256: str) -> None:
        self.hashes[stored.name] = sha256
        self._aside.record(stored.name, sha256)


def forget(file: int, start: int, size: int) -> None:
    """Let the kernel reuse the pages of what is read once, rather than find new ones."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, start, size, os.POSIX_FADV_DONTNEED)


def copy_range(source: int, start: int, target: int, place: int, size: int) -> None:
    """Bytes from file to file, inside the kernel (by reference, where the file system can)."""
    copy: Callable[..., int] | None = getattr(os, "copy_file_range", None)
    while size > 0:
        count = 0
        if copy:
            try:
                count = copy(source, target, size, start, place)
            except OSError:  # another device, or a file system that cannot
                copy = None
        if not count:
            chunk = os.pread(source, min(CHUNK, size), start)
            if not chunk:
                raise MergeError("A file of the base ends early; fetch it again.")
            write_all(target, memoryview(chunk), place)
            count = len(chunk)
        start, place, size = start + count, place + count, size - count


def write_all(file: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(file, data, offset)
        data, offset = data[count:], offset + count


def in_last_places(found: Tensor, exact: Tensor, before: Tensor) -> float:
    """The largest |found - exact| in units of the last place, but for the noise of a float32 sum.

    A perfect rounding makes 0.5 of it; `before` is the base.
    """
    limits = torch.finfo(found.dtype)
    spacing = torch.exp2(exact.abs().clamp(min=limits.tiny).log2().floor()) * limits.eps
    noise = 2e-6 * ((exact - before.double()).abs().amax(1, keepdim=True) + exact.abs())
    return float((((found.double() - exact).abs() - noise) / spacing).max())
