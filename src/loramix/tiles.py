"""bfloat16 matrices in a form that a small C function (native/tiles.c) multiplies few rows by.

A step that answers a few requests multiplies a row for each by all of a base and of its adapters.
torch reads the base's matrices at half to two thirds of the speed of memory, and spends more on
each product with a thin factor than on reading it; the scaling by the gates and the sum with W x
are operations of their own. Here they are part of the product, which costs a call without dispatch.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loramix.errors import EngineError
from loramix.native import Native, compiled

log = logging.getLogger(__name__)
TILE = 16  # outputs
WOVEN = 4  # tiles, in the form that oneDNN packs a matrix into
MOST_ROWS = 24  # beyond which oneDNN multiplies faster by a packed matrix
LARGE = 1 << 28  # bytes of a base beside whose opening a few seconds more are little


@dataclass(frozen=True, slots=True, eq=False)
class Tiles:
    """A bfloat16 matrix [O, K], K even, for products with rows x [.., K] that lie evenly apart."""

    tiles: Tensor  # [O / 16 / G, K / 2, 16 G, 2], the last tile filled up with zeros; G is 1 or 4
    num_outputs: int
    multiply: Any

    @property
    def dtype(self) -> torch.dtype:
        return self.tiles.dtype

    def matrix(self) -> Tensor:
        """A plain copy [O, K], of tiles that are not woven."""
        _, pairs, tile, _ = self.tiles.shape
        assert tile == TILE
        return self.tiles.transpose(1, 2).reshape(-1, 2 * pairs)[: self.num_outputs]

    def product(
        self, x: Tensor, bias: Tensor | None = None, update: tuple[Tensor, Tiles] | None = None
    ) -> Tensor:
        """The rows x times matrix^T, and the bias [O] added: [.., O].

        An update (s [.., R], B) adds s B^T, rounded together with the product.
        """
        y = x.new_empty(*x.shape[:-1], self.num_outputs)
        self._run(x.contiguous().view(-1, x.shape[-1]), y, addend=bias, update=update)
        return y

    def scaled(self, x: Tensor, scale: Tensor) -> Tensor:
        """(x matrix^T) * scale [.., O], the scale as bfloat16."""
        y = x.new_empty(scale.shape)
        self._run(x, y, scale=scale)
        return y

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add x matrix^T to y in place."""
        self._run(x, y, addend=y)

    def _run(
        self,
        x: Tensor,
        y: Tensor,
        *,
        scale: Tensor | None = None,
        addend: Tensor | None = None,
        update: tuple[Tensor, Tiles] | None = None,
    ) -> None:
        x = x if x.stride(-1) == 1 else x.contiguous()
        shrunk, b = update or (None, None)
        self.multiply(
            x.data_ptr(),
            self.tiles.data_ptr(),
            None if scale is None else scale.data_ptr(),
            None if addend is None else addend.data_ptr(),
            y.data_ptr(),
            None if shrunk is None else shrunk.data_ptr(),
            None if b is None else b.tiles.data_ptr(),
            y.numel() // self.num_outputs,
            x.shape[-1],
            self.num_outputs,
            x.stride(-2),
            self.num_outputs if addend is y else 0,
            self.tiles.shape[-2] // TILE,
            0 if shrunk is None else shrunk.shape[-1],
            0 if shrunk is None else shrunk.stride(-2),
            torch.get_num_threads(),
        )


class Tiler:
    """Brings matrices into this form. Raises EngineError where the function cannot be had."""

    def __init__(self) -> None:
        self.native: Native = compiled()

    def tiles(self, matrix: Tensor) -> Tiles:
        """A copy of a matrix [O, K] that `fits`."""
        rows, width = matrix.shape
        filled = matrix
        if rows % TILE or not matrix.is_contiguous() or matrix.storage_offset() % 2:
            filled = matrix.new_empty(rows + -rows % TILE, width)
            filled[:rows], filled[rows:] = matrix, 0
        # Two bfloat16 as one int32: torch transposes single elements several times faster.
        pairs = filled.view(torch.int32).view(-1, TILE, width // 2).transpose(1, 2).contiguous()
        tiles = pairs.view(matrix.dtype).view(*pairs.shape, 2)
        return Tiles(tiles, rows, self.native.multiply)

    def woven(self, tiles: Tensor) -> Tiles:
        """A base's matrix that lies in woven tiles [O / 64, K / 2, 64, 2] already; no copy."""
        return Tiles(tiles, len(tiles) * WOVEN * TILE, self.native.multiply_long)


def can_join(several: Sequence[Tiles], dim: int) -> bool:
    """Whether the tiles of one begin where those of another end, along O or K."""
    return dim == 1 or not any(tiles.num_outputs % TILE for tiles in several[:-1])


def joined(several: Sequence[Tiles], dim: int) -> Tiles:
    """Matrices side by side along O or K, copied as they lie; one is not copied."""
    first = several[0]
    if len(several) == 1:
        return first
    num_outputs = first.num_outputs if dim == 1 else sum(t.num_outputs for t in several)
    return Tiles(torch.cat([t.tiles for t in several], dim=dim), num_outputs, first.multiply)


def tiler_of(model: nn.Module, wanted: bool | None) -> Tiler | None:
    """For a model and its adapters, None where torch is to multiply; EngineError if wanted in vain.

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
        log.info("Products of few rows are torch's: %s", error)
        return None


def fits(matrix: Tensor) -> bool:
    """Whether tiles can hold it."""
    even = matrix.numel() > 0 and matrix.shape[1] % 2 == 0
    return even and matrix.is_cpu and matrix.dtype == torch.bfloat16
