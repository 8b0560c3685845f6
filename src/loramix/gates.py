"""The gates of a forward pass, and (x A^T) * g for the layers that are given the same input.

Side by side suits tokens of many mixes, a few each. Many tokens of one mix, as in a long prompt,
have their own span of the row and their own gates: they pay for the adapters of their mix alone.
Layers that are given the same input (q, k and v; gate and up) share one product for all their A's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from loramix.frozen import product
from loramix.stacked import Block, Layout, Part, Sibling, Siblings
from loramix.tiles import Tiler, Tiles


@dataclass(frozen=True, slots=True)
class Gates:
    """Mixes of a forward pass: which adapters, and each row's weight for each of them.

    They hold for all tokens, or for those of `span`: then the other tokens see none of these
    adapters and do not pay for them. With `part` they hold for some rows of the batch, and the
    gates of a pass are those of its parts, in order and without a gap: so experts learn together.
    With `keep` the same adapters are expected in the next passes too, so the layers keep copies of
    their factors in the form that is fastest; no gradient flows then.
    """

    adapters: tuple[str, ...]  # K names
    weights: Tensor  # [N, T, K], or [N, 1, K] when a row keeps one mix; T of the span, if given
    dropout: float = 0.0  # share of the input that no adapter sees, while training
    span: tuple[int, int] | None = None  # first token and the one after the last
    keep: bool = False
    part: tuple[int, int] | None = None  # first row and the one after the last

    def rows(self, x: Tensor) -> Tensor:
        """The tokens of x [.., T, D] that these gates hold for, as a view."""
        return x if self.span is None else x[..., self.span[0] : self.span[1], :]


class ActiveMixes:
    """The gates of the batch now in flight, shared by all layers of one model.

    Handed to each layer when the model is wrapped, so there is no module global: two engines can
    live in one process, and a test needs no reset.
    """

    def __init__(self, tiler: Tiler | None = None) -> None:
        self.tiler = tiler
        self.gates: tuple[Gates, ...] = ()
        self._input: Tensor | None = None  # of the layer that ran last
        self._siblings = Siblings()  # the layers that are given it
        self._shares: dict[int, list[Share | None]] = {}  # theirs, by gates
        self._scales: dict[tuple[int, Layout, torch.dtype, int], Tensor] = {}

    @contextmanager
    def using(self, *gates: Gates) -> Iterator[None]:
        """Gates of one forward pass; with several, each has a span."""
        assert not self.gates, "forward passes do not nest"
        self.gates = gates
        try:
            yield
        finally:
            self.gates, self._input = (), None
            self._shares.clear()
            self._scales.clear()

    def share(self, n: int, layer: Sibling, x: Tensor) -> Share | None:
        """What the gates numbered n, which are kept, give this layer for its input x [.., D].

        None if none of their adapters acts here. Whoever is given the very same tensor is a
        sibling: the first of them makes the product for all.
        """
        if x is not self._input:
            self._input, self._siblings = x, layer.siblings
            self._shares.clear()
        elif layer.siblings is not self._siblings:  # they meet for the first time
            self._siblings.join(layer)
            self._shares.clear()
        shares = self._shares.get(n)
        if shares is None:
            shares = self._shares[n] = self._shared(n, x)
        return shares[layer.place]

    def _shared(self, n: int, x: Tensor) -> list[Share | None]:
        """(x A^T) * g, cut up among the siblings."""
        gates = self.gates[n]
        block = self._siblings.block(gates.adapters)
        if block is None:
            return [None] * len(self._siblings.layers)
        x = gates.rows(x)
        key = (n, block.layout, block.dtype, x.dim())
        if key not in self._scales:
            self._scales[key] = scale_of(gates, block, x)
        shrunk = shrunk_by(x, block.a, self._scales[key])
        cut = (shrunk,) if len(block.ranks) == 1 else shrunk.split_with_sizes(block.ranks, -1)
        return [(own, part) if part else None for own, part in zip(cut, block.parts, strict=True)]


Share = tuple[Tensor, Part]  # one layer's (x A^T) * g, [.., R], and what it is multiplied by


def like(weights: Tensor, x: Tensor) -> Tensor:
    """Weights [N, T or 1, K] for x [N, T, D], or for x [N * T, D] of layers that know no rows."""
    if x.dim() == 3:
        return weights
    tokens = x.shape[0] // weights.shape[0]
    return weights.expand(-1, tokens, -1).reshape(x.shape[0], -1)


def scale_of(gates: Gates, block: Block, x: Tensor) -> Tensor:
    """Each token's weight for each rank column, [.., R]."""
    return like(gates.weights, x)[..., block.owner].to(block.dtype)


def shrunk_by(x: Tensor, a: Tensor | Tiles, scale: Tensor) -> Tensor:
    """(x A^T) * g"""
    if isinstance(a, Tiles):
        return a.scaled(x, scale)
    shrunk = product(x if x.dtype == a.dtype else x.to(a.dtype), a)
    if shrunk.dtype == torch.float16:  # past 65504 it is inf, and inf * 0 would be NaN
        shrunk = shrunk.masked_fill(scale == 0, 0)
    return shrunk * scale
