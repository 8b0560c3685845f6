"""A base as it lies on disk: safetensors files, read by byte ranges and never loaded."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loramix.errors import BaseError

ONE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_HEADER = 100 << 20  # bytes, the limit of safetensors itself
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor in a file."""

    name: str
    file: Path
    offset: int  # from the start of the file
    size_bytes: int
    shape: tuple[int, ...]
    kind: str  # as safetensors calls the dtype

    @property
    def dtype(self) -> torch.dtype:
        """BaseError for what is no float of 16 bits or more."""
        if self.kind not in DTYPES:
            raise BaseError(
                f"{self.name} is stored as {self.kind}, a quantised format: an update folded into "
                f"it would be rounded away; merge into the unquantised checkpoint it was made from."
            )
        return DTYPES[self.kind]

    @property
    def row_bytes(self) -> int:
        return self.size_bytes // self.shape[0]

    def rows(self, start: int, stop: int) -> Tensor:
        """Some rows as they are stored, [N, D]."""
        out = torch.empty(stop - start, *self.shape[1:], dtype=self.dtype)
        with self.file.open("rb") as stream:
            read_into(stream.fileno(), out, self.offset + start * self.row_bytes)
        return out


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of weights: its header as it is, and its tensors in the order of their bytes."""

    name: str
    header: bytes  # with the eight bytes of its length
    tensors: tuple[Stored, ...]

    @property
    def size_bytes(self) -> int:
        return len(self.header) + sum(tensor.size_bytes for tensor in self.tensors)


@dataclass(frozen=True, slots=True)
class StoredBase:
    """A base: its config, and its files as they lie."""

    folder: Path
    config: Mapping[str, Any]
    shards: tuple[Shard, ...]

    @property
    def tensors(self) -> dict[str, Stored]:
        return {tensor.name: tensor for shard in self.shards for tensor in shard.tensors}

    @property
    def size_bytes(self) -> int:
        return sum(shard.size_bytes for shard in self.shards)

    @property
    def text_config(self) -> Mapping[str, Any]:
        """Of the language model, where it is one part of several."""
        inner = self.config.get("text_config")
        return inner if isinstance(inner, Mapping) else self.config


def open_stored(folder: str | Path) -> StoredBase:
    """Read the headers of a base's files. BaseError if they are not whole, or quantised."""
    folder = Path(folder)
    config = _json(folder / "config.json")
    quantised = config.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method", "?") if isinstance(quantised, Mapping) else "?"
        raise BaseError(
            f"{folder} is quantised ({method}): an update folded into it would be rounded away; "
            f"merge into the unquantised checkpoint, or serve the adapter on top of this one."
        )
    if (folder / INDEX).exists():
        files = _json(folder / INDEX).get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
            raise BaseError(f"{folder / INDEX} has no map of tensors to files; fetch it again.")
        names = sorted(set(files.values()))
    elif (folder / ONE).exists():
        names = [ONE]
    else:
        raise BaseError(
            f"{folder} has no {ONE} and no {INDEX}; save the base as safetensors first."
        )
    if any(Path(name).name != name for name in names):
        raise BaseError(f"{folder / INDEX} names files outside its folder; fetch it again.")
    found = StoredBase(folder, config, tuple(_shard(folder / name) for name in names))
    if len(found.tensors) != sum(len(shard.tensors) for shard in found.shards):
        raise BaseError(f"{folder} has a tensor in two files; fetch it again.")
    return found


def read_into(file: int, out: Tensor, offset: int) -> None:
    """Fill a contiguous tensor with the bytes at `offset`; BaseError if the file ends before."""
    room = bytes_of(out)
    while room:
        count = os.preadv(file, [room], offset)
        if not count:
            raise BaseError("A file of the base ends early; fetch it again.")
        room, offset = room[count:], offset + count


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return tensor.view(torch.uint8).reshape(-1).numpy().data


def _shard(file: Path) -> Shard:
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(head := stream.read(8), "little")
            if size < 8 or length > min(MAX_HEADER, size - 8):
                raise BaseError(f"{file} is not a safetensors file; fetch it again.")
            text = stream.read(length)
    except OSError as error:
        raise BaseError(
            f"{file} cannot be read: {error.strerror}; fetch the base again."
        ) from error
    start = 8 + length
    try:
        entries: dict[str, Any] = json.loads(text)
        entries.pop("__metadata__", None)
        tensors = [_stored(name, file, start, entry) for name, entry in entries.items()]
    except (ValueError, KeyError, TypeError) as error:
        raise BaseError(f"The header of {file} cannot be read; fetch it again.") from error
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.size_bytes))
    end = start
    for tensor in tensors:
        if tensor.offset != end:
            raise BaseError(f"{file} has holes or overlaps between its tensors; fetch it again.")
        end += tensor.size_bytes
    if end != size:
        raise BaseError(f"{file} has {size} bytes, its header says {end}; fetch it again.")
    return Shard(file.name, head + text, tuple(tensors))


def _stored(name: str, file: Path, start: int, entry: Mapping[str, Any]) -> Stored:
    begin, end = entry["data_offsets"]
    shape = tuple(int(side) for side in entry["shape"])
    found = Stored(name, file, start + begin, end - begin, shape, str(entry["dtype"]))
    if found.kind in DTYPES and found.size_bytes != math.prod(shape) * found.dtype.itemsize:
        raise ValueError(name)
    return found


def _json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise BaseError(
            f"{file} cannot be read: {error.strerror}; expected the folder of a whole model."
        ) from error
    except ValueError as error:
        raise BaseError(f"{file} is not JSON; fetch it again.") from error
    if not isinstance(value, dict):
        raise BaseError(f"{file} is not a JSON object; fetch it again.")
    return value
