"""Linear layers in which every row of the batch has its own mix.

    y = W x + ((x A^T) * g) B^T          A [R, D]   B [O, R]   g [.., R]

A and B hold the adapters present in the batch side by side, R is the sum of their ranks, and
g gives each rank column the weight its row gives to the adapter that owns it. A new mix is a new
row of weights: no merge, no load. The engine serves through these layers and training learns
through them, so what was trained is what is served.

Side by side suits tokens of many requests, a few each. A long prompt has its own span of the row,
and its own gates: it pays for the adapters of its mix alone. Layers that are given the same input
(q, k and v; gate and up) share one product for all their A's.

DoRA stays exact. With c = magnitude / |W + b a| per output, its update is
dW x = c * (b a x) + (c - 1) * (W x): c is folded into b when the adapter is bound to the layer,
and c - 1 is kept as the adapter's `gain`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loramix.adapter import Adapter
from loramix.errors import BaseMismatch, UnknownAdapter
from loramix.frozen import FrozenLinear, can_pack, packed, product
from loramix.lora import Pair, dora_gain
from loramix.quantized import Int8Linear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    Layer: TypeAlias = "nn.Linear | Conv1D | FrozenLinear | Int8Linear | MixedLinear"

KINDS = (Conv1D, FrozenLinear, Int8Linear)  # beside nn.Linear itself, not what derives from it
MAX_SETS = 4  # sets of adapters whose side-by-side factors are kept


@dataclass(frozen=True, slots=True)
class Gates:
    """Mixes of a forward pass: which adapters, and each row's weight for each of them.

    They hold for all tokens, or for those of `span`: then the other tokens see none of these
    adapters and do not pay for them. With `keep` the same adapters are expected in the next passes
    too, so the layers keep copies of their factors in the form that is fastest; no gradient flows
    then.
    """

    adapters: tuple[str, ...]  # K names
    weights: Tensor  # [N, T, K], or [N, 1, K] when a row keeps one mix; T of the span, if given
    dropout: float = 0.0  # share of the input that no adapter sees, while training
    span: tuple[int, int] | None = None  # first token and the one after the last
    keep: bool = False

    def rows(self, x: Tensor) -> Tensor:
        """The tokens of x [.., T, D] that these gates hold for, as a view."""
        return x if self.span is None else x[..., self.span[0] : self.span[1], :]


class ActiveMixes:
    """The gates of the batch now in flight, shared by all layers of one model.

    Handed to each layer when the model is wrapped, so there is no module global: two engines can
    live in one process, and a test needs no reset.
    """

    def __init__(self) -> None:
        self.gates: tuple[Gates, ...] = ()
        self._input: Tensor | None = None  # of the layer that ran last
        self._siblings = Siblings()  # the layers that are given it
        self._shrunk: dict[int, tuple[Block, Sequence[Tensor]]] = {}  # by gates: (x A^T) * g
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
            self._shrunk.clear()
            self._scales.clear()

    def meet(self, layer: MixedLinear, x: Tensor) -> None:
        """A layer is given x: whoever is given the very same tensor is its sibling."""
        if x is self._input:
            self._siblings.join(layer)
        else:
            self._input, self._siblings = x, layer.siblings
            self._shrunk.clear()

    def shrunk(self, n: int, block: Block, x: Tensor) -> Sequence[Tensor]:
        """What a kept block's A's make of x [.., D], weighed by the gates numbered n.

        [.., R] for each of its parts.
        """
        known = self._shrunk.get(n)
        if known is None or known[0] is not block:  # a block of fewer siblings, the first time
            key = (n, block.layout, block.a.dtype, x.dim())
            if key not in self._scales:
                self._scales[key] = _scale(self.gates[n], block, x)
            shrunk = _shrunk(x, block.a, self._scales[key])
            several = len(block.ranks) > 1
            parts = shrunk.split_with_sizes(block.ranks, -1) if several else (shrunk,)
            known = self._shrunk[n] = block, parts
        return known[1]


@dataclass(frozen=True, slots=True)
class Bound:
    """One adapter's update as a layer applies it."""

    a: Tensor  # [R, D]
    b: Tensor  # [O, R], a DoRA magnitude folded in
    gain: Tensor | None  # [O], what DoRA adds to W x


def bound(pair: Pair, layer: Layer) -> Bound:
    """An update as this layer, or the one that wraps it, applies it."""
    if pair.magnitude is None:
        return Bound(pair.a, pair.b, None)
    scale = dora_gain(pair, layer.weight.T if isinstance(layer, Conv1D) else layer.weight)
    return Bound(pair.a, (scale[:, None] * pair.b).to(pair.b.dtype), scale - 1)


Layout = tuple[tuple[int, int], ...]  # gate column and rank of the updates in a block, in order


@dataclass(frozen=True, slots=True)
class Part:
    """The B's of one layer side by side."""

    b: Tensor  # [O, R]
    gains: Tensor | None  # [K', O]
    gain_owner: Tensor  # [K']


@dataclass(frozen=True, slots=True)
class Block:
    """The updates of several adapters side by side, for layers that are given the same input."""

    a: Tensor  # [R, D], of one layer after the other
    layout: Layout
    owner: Tensor  # [R], the gate column that weighs each rank column
    ranks: list[int]  # of each layer; they add up to R
    parts: Sequence[Part]  # of each layer


class Siblings:
    """Layers that are given the same input, and their factors side by side."""

    def __init__(self, *layers: MixedLinear) -> None:
        self.layers = list(layers)
        self._blocks: dict[tuple[str, ...], tuple[bool, Block | None]] = {}  # packed or not

    def join(self, layer: MixedLinear) -> None:
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
        to_pack = self.layers[0].is_packed  # while layers turn, the others may not be: no matter
        known = self._blocks.get(names)
        if known is None or known[0] != to_pack:
            block = _stacked(self.layers, names)
            if block and to_pack:
                parts = [replace(part, b=_packed(part.b)) for part in block.parts]
                block = replace(block, a=_packed(block.a), parts=parts)
            known = self._blocks[names] = to_pack, block
        return known[1]


def _stacked(layers: Sequence[MixedLinear], names: tuple[str, ...]) -> Block | None:
    """Updates of different precision meet in the widest."""
    found = [
        [(k, layer.bound[name]) for k, name in enumerate(names) if name in layer.bound]
        for layer in layers
    ]
    bounds = [bound for here in found for _, bound in here]
    if not bounds:
        return None
    device = bounds[0].a.device
    dtype = max((bound.a.dtype for bound in bounds), key=lambda dtype: dtype.itemsize)
    layout = tuple((k, bound.a.shape[0]) for here in found for k, bound in here)
    return Block(
        a=_cat([bound.a.to(dtype) for bound in bounds], dim=0),
        layout=layout,
        owner=torch.tensor([k for k, rank in layout for _ in range(rank)], device=device),
        ranks=[sum(bound.a.shape[0] for _, bound in here) for here in found],
        parts=[
            _part(here, layer.shape[0], dtype, device)
            for here, layer in zip(found, layers, strict=True)
        ],
    )


def _part(
    here: Sequence[tuple[int, Bound]], width: int, dtype: torch.dtype, device: torch.device
) -> Part:
    gained = [(k, bound.gain) for k, bound in here if bound.gain is not None]
    return Part(
        _cat([bound.b.to(dtype) for _, bound in here], dim=1)
        if here
        else torch.empty(width, 0, dtype=dtype, device=device),
        torch.stack([gain for _, gain in gained]) if gained else None,
        torch.tensor([k for k, _ in gained], device=device, dtype=torch.long),
    )


def _packed(factor: Tensor) -> Tensor:
    """Packed, unless it is of another precision than the base, or of no rank here."""
    return packed(factor) if factor.numel() and can_pack(factor) else factor


def _cat(tensors: Sequence[Tensor], dim: int) -> Tensor:
    """One tensor is not copied."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim=dim)


def _like(weights: Tensor, x: Tensor) -> Tensor:
    """Weights [N, T or 1, K] for x [N, T, D], or for x [N * T, D] of layers that know no rows."""
    if x.dim() == 3:
        return weights
    tokens = x.shape[0] // weights.shape[0]
    return weights.expand(-1, tokens, -1).reshape(x.shape[0], -1)


def _scale(gates: Gates, block: Block, x: Tensor) -> Tensor:
    """Each token's weight for each rank column, [.., R]."""
    return _like(gates.weights, x)[..., block.owner].to(block.a.dtype)


def _shrunk(x: Tensor, a: Tensor, scale: Tensor) -> Tensor:
    """(x A^T) * g"""
    shrunk = product(x.to(a.dtype), a)
    if shrunk.dtype == torch.float16:  # past 65504 it is inf, and inf * 0 would be NaN
        shrunk = shrunk.masked_fill(scale == 0, 0)
    return shrunk * scale


class MixedLinear(nn.Module):
    """A frozen linear layer and the adapters bound to it."""

    def __init__(self, base: Layer, active: ActiveMixes) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.active = active
        self.bound: dict[str, Bound] = {}
        self.siblings = Siblings(self)
        self.place = 0  # among them
        self._gained = False  # some adapter here is a DoRA

    @property
    def weight(self) -> Tensor:
        """The base matrix as [O, D], whichever way the layer stores it."""
        return self.base.weight.T if isinstance(self.base, Conv1D) else self.base.weight

    @property
    def shape(self) -> tuple[int, int]:
        """(O, D)"""
        return shape(self.base)

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    @property
    def is_packed(self) -> bool:
        """Whether the base's matrix is, and the adapters' are to be."""
        return isinstance(self.base, FrozenLinear) and self.base.is_packed

    def bind(self, name: str, pair: Pair) -> None:
        """Take one adapter's update; the tensors keep their dtype, autograd reaches them."""
        self.take(name, bound(pair, self))

    def take(self, name: str, update: Bound) -> None:
        self.bound[name] = update
        self._changed(name)

    def unbind(self, name: str) -> None:
        self.bound.pop(name, None)
        self._changed(name)  # also if it is not here: sets that it is in are

    def _changed(self, name: str) -> None:
        self.siblings.forget(name)
        self._gained = any(bound.gain is not None for bound in self.bound.values())

    def forward(self, x: Tensor) -> Tensor:  # [N, T, D] -> [N, T, O]
        y: Tensor = self.base(x)
        if not self.active.gates or not self.bound:
            return y
        self.active.meet(self, x)
        wx = y.clone() if self._gained else y
        for n, gates in enumerate(self.active.gates):
            rows, plain = gates.rows(x), gates.rows(wx)
            if gates.keep:
                update = self._kept_update(rows, plain, n, gates)
            else:
                update = self._fresh_update(rows, plain, gates)
            if update is None:
                continue
            if gates.keep or gates.span:
                gates.rows(y).add_(update)
            else:
                y = y + update
        return y

    def _kept_update(self, x: Tensor, wx: Tensor, n: int, gates: Gates) -> Tensor | None:
        """What the adapters of the gates numbered n add to W x, [.., O]; None if nothing."""
        block = self.siblings.block(gates.adapters)
        if block is None or not block.ranks[self.place]:
            return None
        shrunk = self.active.shrunk(n, block, x)[self.place]
        return self._grown(shrunk, block.parts[self.place], wx, gates)

    def _fresh_update(self, x: Tensor, wx: Tensor, gates: Gates) -> Tensor | None:
        """The same for factors that nobody keeps: while training, and for a long prompt."""
        block = _stacked([self], gates.adapters)
        if block is None:
            return None
        x = F.dropout(x, gates.dropout) if gates.dropout else x
        shrunk = _shrunk(x, block.a, _scale(gates, block, x))
        return self._grown(shrunk, block.parts[0], wx, gates)

    def _grown(self, shrunk: Tensor, part: Part, wx: Tensor, gates: Gates) -> Tensor:
        """B and the gains of DoRA"""
        update = product(shrunk, part.b)
        if part.gains is not None:
            plain = wx if self.base.bias is None else wx - self.base.bias
            gains = _like(gates.weights, wx)[..., part.gain_owner].float() @ part.gains
            update = update + gains * plain
        return update.to(wx.dtype)


class MixedModel:
    """A transformers model whose adapted layers are `MixedLinear`.

    Layers are wrapped when the first adapter reaches them, so an adapter costs nothing where it
    does not act. The model is changed in place and stays usable as it was: without active gates
    every layer is its base.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        model.requires_grad_(False)
        self.active = ActiveMixes()
        self.layers: dict[str, MixedLinear] = {}
        self.digests: dict[str, str] = {}
        self._shapes = linear_shapes(model)
        self._sets: list[tuple[str, ...]] = []  # used last at the end

    def check(self, adapter: Adapter) -> None:
        """BaseMismatch, naming the strays, unless every update finds a layer of its shape."""
        check_fit(adapter, self._shapes)

    def bind(self, adapter: Adapter, dtype: torch.dtype | None = None) -> None:
        """Make an adapter available to gates, in `dtype` or its own precision.

        Raises BaseMismatch; the model is then left as it was. Binding a name again replaces it.
        """
        self.check(adapter)
        self.take(adapter.name, adapter.digest, self.prepared(adapter, dtype))

    def prepared(self, adapter: Adapter, dtype: torch.dtype | None = None) -> dict[str, Bound]:
        """An adapter's updates as the layers apply them. Changes nothing; any thread may call."""
        found = {}
        for name, pair in adapter.pairs.items():
            layer: Any = self.model.get_submodule(name)
            found[name] = bound(pair.to(dtype or pair.a.dtype, self.model.device), layer)
        return found

    def take(self, name: str, digest: str, updates: Mapping[str, Bound]) -> None:
        """Make prepared updates available to gates."""
        self.unbind(name, missing_ok=True)
        for layer, update in updates.items():
            self._wrap(layer).take(name, update)
        self.digests[name] = digest

    def unbind(self, name: str, *, missing_ok: bool = False) -> None:
        if name not in self.digests and not missing_ok:
            raise UnknownAdapter(name, self.digests)
        for layer in self.layers.values():
            layer.unbind(name)
        self._sets = [names for names in self._sets if name not in names]
        self.digests.pop(name, None)

    def together(self, names: Iterable[str], spare: float = 0.5) -> tuple[str, ...]:
        """A set of adapters to keep side by side that has these: one in use, if little larger.

        Copying the factors of a set costs about a step, reading one that is not needed a percent of
        one: up to `spare` more than these are taken into the bargain.
        """
        wanted = set(names)
        most = len(wanted) * (1 + spare)
        fit = [found for found in self._sets if wanted <= set(found) and len(found) <= most]
        chosen = min(fit, key=len, default=tuple(sorted(wanted)))
        self._sets = [*(found for found in self._sets if found != chosen), chosen]
        return chosen

    def tidy(self) -> None:
        """Drop the copies of all but the sets that were used last."""
        for old in self._sets[:-MAX_SETS]:
            for layer in self.layers.values():
                layer.siblings.drop(old)
        self._sets = self._sets[-MAX_SETS:]

    def release(self) -> None:
        """Put the base's own layers back; the model is as it was before it was wrapped."""
        for name, layer in self.layers.items():
            parent, _, child = name.rpartition(".")
            setattr(self.model.get_submodule(parent), child, layer.base)
        self.layers.clear()
        self.digests.clear()

    def _wrap(self, name: str) -> MixedLinear:
        if name not in self.layers:
            parent, _, child = name.rpartition(".")
            owner = self.model.get_submodule(parent)
            base = getattr(owner, child)
            self.layers[name] = MixedLinear(base, self.active)
            setattr(owner, child, self.layers[name])
        return self.layers[name]


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(O, D) of every layer an adapter can act on, by name, wrapped already or not."""
    shapes: dict[str, tuple[int, int]] = {}
    for name, module in model.named_modules():
        if name.removesuffix(".base") in shapes:
            continue  # inside a layer that another model wrapped
        if type(module) is nn.Linear or isinstance(module, (*KINDS, MixedLinear)):
            shapes[name] = shape(module)
    return shapes


def shape(layer: Layer) -> tuple[int, int]:
    """(O, D)"""
    if isinstance(layer, MixedLinear):
        return layer.shape
    if isinstance(layer, Conv1D):
        return layer.weight.shape[1], layer.weight.shape[0]
    return layer.out_features, layer.in_features


def check_fit(adapter: Adapter, shapes: Mapping[str, tuple[int, int]]) -> None:
    """BaseMismatch unless every update finds a layer of its shape."""
    strays = [name for name in adapter.pairs if name not in shapes]
    if strays:
        raise BaseMismatch(
            f"{len(strays)} of {len(adapter.pairs)} updates of {adapter.name!r} find no linear "
            f"layer in this base (first: {strays[0]}); it was trained for "
            f"{adapter.card.base or 'another'} model: open that base, or use another adapter."
        )
    for name, pair in adapter.pairs.items():
        found = (pair.b.shape[0], pair.a.shape[1])
        if found != shapes[name]:
            raise BaseMismatch(
                f"{adapter.name!r} has an update of shape {found} for {name}, which is "
                f"{shapes[name]} in this base; it was trained for {adapter.card.base or 'another'}"
                f" model: open that base, or use another adapter."
            )
