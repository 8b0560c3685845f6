"""Files that are written past the page cache, whose pages cost more to find than bytes to write.

The kernel takes whole pages from memory that begins where a page does. What is before and after
them, less than a page each, goes through the cache, as all does where a file system cannot.
"""

from __future__ import annotations

import errno
import math
import os
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from loramix.merge.stored import bytes_of

PAGE = 4096


class Output:
    """A file that several threads write, each its own places."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        self._opened = ExitStack()
        self.file = self._open(path, os.O_RDWR | os.O_CREAT)
        os.ftruncate(self.file, size_bytes)
        if hasattr(os, "posix_fadvise"):  # single rows are read back
            os.posix_fadvise(self.file, 0, 0, os.POSIX_FADV_RANDOM)
        self._direct: int | None = None
        with suppress(OSError, AttributeError):  # not on every file system, or not on this one
            self._direct = self._open(path, os.O_WRONLY | os.O_DIRECT)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def write(self, data: Tensor, place: int) -> None:
        """The bytes of a contiguous tensor, at this place of the file."""
        raw, before = bytes_of(data), -place % PAGE
        whole = (len(raw) - before) // PAGE * PAGE
        if whole <= 0 or (data.data_ptr() + before) % PAGE:
            write_all(self.file, raw, place)
            return
        write_all(self.file, raw[:before], place)
        self._write_pages(raw[before : before + whole], place + before)
        write_all(self.file, raw[before + whole :], place + before + whole)

    def _write_pages(self, data: memoryview, place: int) -> None:
        if self._direct is not None:
            try:
                write_all(self._direct, data, place)
                return
            except OSError as error:
                if error.errno != errno.EINVAL:  # it wants more than pages, or cannot after all
                    raise
                self._direct = None
        write_all(self.file, data, place)

    def _open(self, path: Path, how: int) -> int:
        file = os.open(path, how, 0o644)
        self._opened.callback(os.close, file)
        return file


class Room:
    """Memory for the bytes that are written next, where pages begin as in the file."""

    def __init__(self, size_bytes: int) -> None:
        self._bytes = torch.empty(size_bytes + PAGE, dtype=torch.uint8)

    def at(self, place: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor, to be written at this place."""
        start = (place - self._bytes.data_ptr()) % PAGE
        start -= start % dtype.itemsize  # where numbers begin; then it is written through the cache
        size = math.prod(shape) * dtype.itemsize
        return self._bytes[start : start + size].view(dtype).view(shape)


def write_all(file: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(file, data, offset)
        data, offset = data[count:], offset + count
