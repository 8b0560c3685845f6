"""The files of a merged model: which there are, their headers, and where each tensor goes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loramix.errors import MergeError
from loramix.merge.stored import INDEX, ONE, Stored, StoredBase

WEIGHTS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".gguf",
    ".onnx",
    ".h5",
    ".msgpack",
    ".index.json",
)


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a tensor of the base goes: a file of the copy, and the offset of its bytes there."""

    stored: Stored
    file: str
    offset: int


@dataclass(frozen=True, slots=True)
class Layout:
    """The files of the copy: their headers, and where every tensor goes."""

    headers: Mapping[str, bytes]
    slots: tuple[Slot, ...]

    @property
    def size_bytes(self) -> int:
        headers = sum(len(header) for header in self.headers.values())
        return headers + sum(slot.stored.size_bytes for slot in self.slots)

    def size_of(self, file: str) -> int:
        mine = [slot.stored.size_bytes for slot in self.slots if slot.file == file]
        return len(self.headers[file]) + sum(mine)


def kept_layout(base: StoredBase) -> Layout:
    """The files of the base, byte for byte but for the folded tensors."""
    slots = [
        Slot(tensor, shard.name, tensor.offset) for shard in base.shards for tensor in shard.tensors
    ]
    return Layout({shard.name: shard.header for shard in base.shards}, tuple(slots))


def new_layout(base: StoredBase, shard_bytes: int) -> Layout:
    """Files of at most `shard_bytes` (or one tensor), in the base's order of tensors."""
    if shard_bytes < 1:
        raise MergeError(f"A shard of {shard_bytes} bytes holds nothing; give a size like 2GB.")
    groups: list[list[Stored]] = [[]]
    for tensor in (tensor for shard in base.shards for tensor in shard.tensors):
        size = sum(each.size_bytes for each in groups[-1])
        if groups[-1] and size + tensor.size_bytes > shard_bytes:
            groups.append([])
        groups[-1].append(tensor)
    count = len(groups)
    headers, slots = {}, []
    for n, group in enumerate(groups, 1):
        name = ONE if count == 1 else f"model-{n:05}-of-{count:05}.safetensors"
        headers[name] = _header(group)
        offset = len(headers[name])
        for tensor in group:
            slots.append(Slot(tensor, name, offset))
            offset += tensor.size_bytes
    return Layout(headers, tuple(slots))


def copy_rest(base: StoredBase, folder: Path) -> None:
    """Config, tokenizer, chat template, generation config: every file that holds no weights."""
    for file in sorted(base.folder.iterdir()):
        if file.is_file() and not file.name.endswith(WEIGHTS) and file.name != "README.md":
            shutil.copyfile(file, folder / file.name)


def write_index(folder: Path, layout: Layout) -> None:
    size = sum(slot.stored.size_bytes for slot in layout.slots)
    index = {
        "metadata": {"total_size": size},
        "weight_map": {slot.stored.name: slot.file for slot in layout.slots},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", "utf-8")


def _header(tensors: list[Stored]) -> bytes:
    """As safetensors lays it out: eight bytes of length, JSON, padded to eight."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        ends = [offset, offset := offset + tensor.size_bytes]
        entries[tensor.name] = {"dtype": tensor.kind, "shape": tensor.shape, "data_offsets": ends}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
