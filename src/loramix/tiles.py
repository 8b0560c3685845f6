"""The factors of adapters in the form that a small C function (tiles.c) multiplies few rows by.

A step under mixes makes hundreds of products of a few rows with thin matrices. torch spends more
on each of them than on reading the matrix, and the scaling by the gates and the sum with W x are
operations of their own. Here they are part of the product, which costs a call without dispatch.

The function is compiled when it is asked for, for this CPU, and is not kept in any file. It runs in
the threads of torch's OpenMP library, which has the name of the system's.
"""

from __future__ import annotations

import ctypes
import logging
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loramix.errors import EngineError

log = logging.getLogger(__name__)
SOURCE = Path(__file__).with_suffix(".c")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fPIC", "-shared")
TILE = 16  # outputs
LARGE = 1 << 28  # bytes of a base beside whose opening a second more is little
_POINTER, _COUNT = ctypes.c_void_p, ctypes.c_int64


@dataclass(frozen=True, slots=True, eq=False)
class Tiles:
    """A bfloat16 matrix [O, K], K even, for products with rows x [.., K] that lie evenly apart."""

    tiles: Tensor  # [O / 16, K / 2, 16, 2], the last tile filled up with zeros
    num_outputs: int
    multiply: Any

    def scaled(self, x: Tensor, scale: Tensor) -> Tensor:
        """(x matrix^T) * scale [.., O], the scale as bfloat16."""
        y = x.new_empty(scale.shape)
        self._run(x, scale.data_ptr(), y)
        return y

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add x matrix^T to y in place."""
        self._run(x, None, y)

    def _run(self, x: Tensor, scale: int | None, y: Tensor) -> None:
        x = x if x.stride(-1) == 1 else x.contiguous()
        self.multiply(
            x.data_ptr(),
            self.tiles.data_ptr(),
            scale,
            y.data_ptr(),
            y.numel() // self.num_outputs,
            x.shape[-1],
            self.num_outputs,
            x.stride(-2),
            torch.get_num_threads(),
        )


class Tiler:
    """Brings matrices into this form. Raises EngineError where the function cannot be had."""

    def __init__(self) -> None:
        self._multiply = _compiled()

    def tiles(self, matrix: Tensor) -> Tiles:
        """A copy of a matrix [O, K] that `fits`."""
        rows, width = matrix.shape
        filled = F.pad(matrix, (0, 0, 0, -rows % TILE)).view(-1, TILE, width // 2, 2)
        return Tiles(filled.transpose(1, 2).contiguous(), rows, self._multiply)


def tiler_of(model: nn.Module, wanted: bool | None) -> Tiler | None:
    """For a model's adapters, None where torch is to multiply; EngineError if it is wanted in vain.

    A `wanted` of None is wherever it can be had and the model is large.
    """
    parameters = list(model.parameters())
    if wanted is False or (wanted is None and sum(p.nbytes for p in parameters) < LARGE):
        return None
    try:
        kinds = {str(p.dtype) for p in parameters} | {p.device.type for p in parameters}
        if kinds != {"torch.bfloat16", "cpu"}:
            raise EngineError(
                f"tiles need a bfloat16 base on the CPU, and this one is of "
                f"{', '.join(sorted(kinds))}; open it so, or leave tiles."
            )
        return Tiler()
    except EngineError as error:
        if wanted:
            raise
        log.info("The adapters' products are torch's: %s", error)
        return None


def fits(matrix: Tensor) -> bool:
    """Whether tiles can hold it."""
    even = matrix.numel() > 0 and matrix.shape[1] % 2 == 0
    return even and matrix.is_cpu and matrix.dtype == torch.bfloat16


def _compiled() -> Any:
    if not torch.cpu._is_avx512_bf16_supported():
        raise EngineError("tiles need a CPU with AVX512-BF16, and this one has none; leave them.")
    compiler = shutil.which("cc")
    if compiler is None:
        raise EngineError(
            "tiles need a C compiler, and there is no cc; install one, or leave tiles."
        )
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "tiles.so"
        made = subprocess.run(
            [compiler, *FLAGS, "-o", str(library), str(SOURCE)], capture_output=True, text=True
        )
        if made.returncode:
            raise EngineError(
                f"{compiler} cannot compile {SOURCE.name}: {made.stderr.strip()[:200]}"
            )
        # PyDLL keeps the interpreter's lock: another thread would hold it longer than a product.
        multiply = ctypes.PyDLL(str(library)).multiply
    multiply.argtypes = [*[_POINTER] * 4, *[_COUNT] * 4, ctypes.c_int]
    multiply.restype = None
    return multiply
