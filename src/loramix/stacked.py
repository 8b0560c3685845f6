"""The factors of several adapters side by side, for the layers that are given the same input.

    A [R, D], of one layer after the other        B [O, R], of each layer by itself

R is the sum of the adapters' ranks. Copying factors together takes about as long as a step, so what
is side by side is kept until one of its adapters leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from loramix.frozen import can_pack, packed
from loramix.linear import matrix_of
from loramix.lora import Pair, dora_gain
from loramix.tiles import Tiler, Tiles, can_join, fits, joined

Layout = tuple[tuple[int, int], ...]  # gate column and rank of the updates in a block, in order


@dataclass(frozen=True, slots=True)
class Bound:
    """One adapter's update as a layer applies it."""

    a: Tensor | Tiles  # [R, D]
    b: Tensor | Tiles  # [O, R], a DoRA magnitude folded in
    gain: Tensor | None  # [O], what DoRA adds to W x

    @property
    def rank(self) -> int:
        return self.a.num_outputs if isinstance(self.a, Tiles) else self.a.shape[0]

    @property
    def device(self) -> torch.device:
        return (self.a.tiles if isinstance(self.a, Tiles) else self.a).device

    def tiled(self, tiler: Tiler) -> Bound:
        """The same in tiles, if they can hold it: laid out once, joined to others as they lie."""
        plain = [factor for factor in (self.a, self.b) if isinstance(factor, Tensor)]
        if self.gain is not None or len(plain) < 2 or not all(map(fits, plain)):
            return self  # tiles know nothing of the gains of DoRA
        return Bound(tiler.tiles(plain[0]), tiler.tiles(plain[1]), None)


def bound(pair: Pair, layer: Any) -> Bound:
    """An update as this layer, or the one that wraps it, applies it."""
    if pair.magnitude is None:
        return Bound(pair.a, pair.b, None)
    scale = dora_gain(pair, matrix_of(layer))
    return Bound(pair.a, (scale[:, None] * pair.b).to(pair.b.dtype), scale - 1)


class Sibling(Protocol):
    """A layer with adapters bound to it (mixed.py)."""

    bound: dict[str, Bound]
    siblings: Siblings
    place: int  # among them

    @property
    def is_packed(self) -> bool: ...

    @property
    def tiler(self) -> Tiler | None: ...


@dataclass(frozen=True, slots=True)
class Part:
    """The B's of one layer side by side."""

    b: Tensor | Tiles  # [O, R]
    gains: Tensor | None  # [K', O]
    gain_owner: Tensor  # [K']


@dataclass(frozen=True, slots=True)
class Block:
    """The updates of several adapters side by side."""

    a: Tensor | Tiles  # [R, D], of one layer after the other
    dtype: torch.dtype
    layout: Layout
    owner: Tensor  # [R], the gate column that weighs each rank column
    ranks: list[int]  # of each layer; they add up to R
    parts: Sequence[Part | None]  # of each layer; None where none of the adapters acts

    def mapped(self, form: Callable[[Tensor], Tensor | Tiles]) -> Block:
        """The same, the factors that are plain in another form."""

        def formed(factor: Tensor | Tiles) -> Tensor | Tiles:
            return factor if isinstance(factor, Tiles) else form(factor)

        parts = [part and replace(part, b=formed(part.b)) for part in self.parts]
        return replace(self, a=formed(self.a), parts=parts)

    @property
    def factors(self) -> list[Tensor | Tiles]:
        return [self.a, *(part.b for part in self.parts if part)]


class Siblings:
    """Layers that are given the same input, and their factors side by side."""

    def __init__(self, *layers: Sibling) -> None:
        self.layers = list(layers)
        # Packed or not, None where tiles hold all of it, which suit any number of rows.
        self._blocks: dict[tuple[str, ...], tuple[bool | None, Block | None]] = {}

    def join(self, layer: Sibling) -> None:
        if layer.siblings is not self:
            layer.siblings, layer.place = self, len(self.layers)
            self.layers.append(layer)
            self._blocks.clear()

    def forget(self, name: str) -> None:
        """Drop the sets that this adapter is in."""
        for names in [names for names in self._blocks if name in names]:
            del self._blocks[names]

    def drop(self, names: tuple[str, ...]) -> None:
        """Drop one set."""
        self._blocks.pop(names, None)

    def block(self, names: tuple[str, ...]) -> Block | None:
        """The factors of these adapters, kept for the next time; None if there are none here."""
        first = self.layers[0]
        to_pack = first.is_packed  # while layers turn, the others may not be: no matter
        known = self._blocks.get(names)
        if known is None or known[0] not in (None, to_pack):
            block = stacked(self.layers, names)
            if block and first.tiler and _can_tile(block):
                known = None, block.mapped(first.tiler.tiles)
            else:
                known = to_pack, block.mapped(_packed) if block and to_pack else block
            self._blocks[names] = known
        return known[1]


def stacked(layers: Sequence[Sibling], names: Sequence[str]) -> Block | None:
    """Updates of different precision meet in the widest; None if none of them acts here."""
    found = [
        [(k, layer.bound[name]) for k, name in enumerate(names) if name in layer.bound]
        for layer in layers
    ]
    bounds = [bound for here in found for _, bound in here]
    if not bounds:
        return None
    dtype = max((bound.a.dtype for bound in bounds), key=lambda dtype: dtype.itemsize)
    layout = tuple((k, bound.rank) for here in found for k, bound in here)
    owner = [k for k, rank in layout for _ in range(rank)]
    return Block(
        a=_cat([bound.a for bound in bounds], dtype, dim=0),
        dtype=dtype,
        layout=layout,
        owner=torch.tensor(owner, device=bounds[0].device),
        ranks=[sum(bound.rank for _, bound in here) for here in found],
        parts=[_part(here, dtype) if here else None for here in found],
    )


def _part(here: Sequence[tuple[int, Bound]], dtype: torch.dtype) -> Part:
    b = _cat([bound.b for _, bound in here], dtype, dim=1)
    gained = [(k, bound.gain) for k, bound in here if bound.gain is not None]
    owner = torch.tensor([k for k, _ in gained], device=here[0][1].device, dtype=torch.long)
    return Part(b, torch.stack([gain for _, gain in gained]) if gained else None, owner)


def _can_tile(block: Block) -> bool:
    """Tiles know nothing of the gains of DoRA."""
    fit = all(isinstance(factor, Tiles) or fits(factor) for factor in block.factors)
    return fit and all(part.gains is None for part in block.parts if part)


def _packed(factor: Tensor) -> Tensor:
    """Packed, unless it is of another precision than the base, or of no rank here."""
    return packed(factor) if factor.numel() and can_pack(factor) else factor


def _cat(factors: Sequence[Tensor | Tiles], dtype: torch.dtype, dim: int) -> Tensor | Tiles:
    """One factor is not copied; tiles stay tiles where they can."""
    tiles = [factor for factor in factors if isinstance(factor, Tiles) and factor.dtype == dtype]
    if len(tiles) == len(factors) and can_join(tiles, dim):
        return joined(tiles, dim)
    plain = [f.matrix() if isinstance(f, Tiles) else f for f in factors]
    plain = [factor.to(dtype) for factor in plain]
    return plain[0] if len(plain) == 1 else torch.cat(plain, dim=dim)
