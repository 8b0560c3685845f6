"""Writes a GGUF file tensor by tensor: never more than one of them in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter, quants
from torch import Tensor

from loramix.errors import FormatError
from loramix.formats.aside import aside

KINDS = {
    "f32": Kind.F32,
    "f16": Kind.F16,
    "bf16": Kind.BF16,
    "q8_0": Kind.Q8_0,
    "q4_0": Kind.Q4_0,
}
HALF = torch.finfo(torch.float16).max  # of a number, or of the scale of a block
LIMITS = {
    Kind.F32: torch.finfo(torch.float32).max,
    Kind.F16: HALF,
    Kind.BF16: torch.finfo(torch.bfloat16).max,
    Kind.Q8_0: 127 * HALF,
    Kind.Q4_0: 8 * HALF,
}
BYTES = np.dtype(np.uint8)
BLOCK = 1 << 22  # values encoded at once, as rounding takes several copies of them


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of the file: what it is called, and how it is made when its turn comes."""

    name: str
    shape: tuple[int, ...]
    kind: Kind
    make: Callable[[], Tensor]


def write_gguf(
    file: Path, architecture: str, describe: Callable[[GGUFWriter], None], entries: Iterable[Entry]
) -> None:
    """Write what `describe` adds and then each entry; the file appears whole or not at all.

    Raises AdapterError if it exists or cannot be written, FormatError for a number that its
    precision cannot hold.
    """
    entries = list(entries)
    with aside(file) as place, closing(GGUFWriter(place, architecture)) as writer:
        describe(writer)
        for entry in entries:
            shape = quants.quant_shape_to_byte_shape(entry.shape, entry.kind)
            size = math.prod(shape)
            writer.add_tensor_info(entry.name, shape, BYTES, size, raw_dtype=entry.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        end = _end(writer)
        for entry in entries:
            tensor = entry.make()
            _check_range(entry, tensor)
            writer.write_tensor_data(encode(tensor, entry.kind))
        writer.close()
        _check_whole(place, end)


def _end(writer: GGUFWriter) -> int:
    """How many bytes the file has when all tensors are in it."""
    assert writer.fout is not None
    parts = [writer.fout[0].tell(), *(info.nbytes for info in writer.tensors[0].values())]
    return sum(GGUFWriter.ggml_pad(size, writer.data_alignment) for size in parts)


def _check_whole(place: Path, end: int) -> None:
    """OSError if less arrived: numpy does not look whether the last bytes of an array did."""
    if (size := place.stat().st_size) != end:
        raise OSError(f"{size:,} of {end:,} bytes arrived, as on a full disk")


def _check_range(entry: Entry, tensor: Tensor) -> None:
    low, high = torch.aminmax(tensor.detach())
    limit = LIMITS[entry.kind]
    if not (-limit <= low and high <= limit):
        raise FormatError(
            f"{entry.name} goes from {low:g} to {high:g}, which {entry.kind.name} cannot hold; "
            f"give another --type such as bf16, or check the model."
        )


def encode(tensor: Tensor, kind: Kind) -> np.ndarray[Any, Any]:
    """The bytes of a tensor, rounded once from the precision it comes in."""
    if tensor.dim() < 2:
        return _encode(tensor, kind)
    step = max(1, BLOCK // tensor.shape[1])
    starts = range(0, len(tensor), step)
    blocks = [_encode(tensor[start : start + step], kind) for start in starts]
    return blocks[0] if len(blocks) == 1 else np.concatenate(blocks)


def _encode(tensor: Tensor, kind: Kind) -> np.ndarray[Any, Any]:
    tensor = tensor.detach().cpu().contiguous()
    if kind == Kind.BF16:
        return tensor.to(torch.bfloat16).view(torch.uint8).numpy()
    return quants.quantize(tensor.float().numpy(), kind)
