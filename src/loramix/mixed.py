"""Linear layers in which every row of the batch has its own mix.

    y = W x + ((x A^T) * g) B^T          A [R, D]   B [O, R]   g [.., R]

A and B hold the adapters present in the batch side by side, R is the sum of their ranks, and
g gives each rank column the weight its row gives to the adapter that owns it. A new mix is a new
row of weights: no merge, no load. The engine serves through these layers and training learns
through them, so what was trained is what is served.

The gates of a pass, and what layers share of its products, are in gates.py.

DoRA stays exact. With c = magnitude / |W + b a| per output, its update is
dW x = c * (b a x) + (c - 1) * (W x): c is folded into b when the adapter is bound to the layer,
and c - 1 is kept as the adapter's `gain`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loramix.adapter import Adapter
from loramix.errors import BaseError, BaseMismatch, UnknownAdapter
from loramix.frozen import FrozenLinear, product
from loramix.gates import ActiveMixes, Gates, like, scale_of, shrunk_by
from loramix.linear import matrix_of, shape
from loramix.lora import Pair
from loramix.quantized import Int8Linear, Nf4Linear
from loramix.sets import Sets
from loramix.stacked import Bound, Part, Siblings, bound, stacked
from loramix.tiles import Tiler, Tiles

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    Layer: TypeAlias = "nn.Linear | Conv1D | FrozenLinear | Int8Linear | Nf4Linear | MixedLinear"

KINDS = (Conv1D, FrozenLinear, Int8Linear, Nf4Linear)  # and nn.Linear, not what derives from it


class MixedLinear(nn.Module):
    """A frozen linear layer and the adapters bound to it."""

    def __init__(self, base: Layer, active: ActiveMixes) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.out_features, self.in_features = shape(base)
        self.active = active
        self.bound: dict[str, Bound] = {}
        self.siblings = Siblings(self)
        self.place = 0  # among them
        self._gained = False  # some adapter here is a DoRA

    @property
    def weight(self) -> Tensor:
        """The base matrix as [O, D], whichever way the layer stores it."""
        return matrix_of(self.base)

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    @property
    def is_packed(self) -> bool:
        """Whether the base's matrix is, and the adapters' are to be."""
        return isinstance(self.base, FrozenLinear) and self.base.is_packed

    @property
    def tiler(self) -> Tiler | None:
        """What brings the factors into tiles, if they are to be."""
        return self.active.tiler

    def bind(self, name: str, pair: Pair) -> None:
        """Take one adapter's update; the tensors keep their dtype, autograd reaches them."""
        self.take(name, bound(pair, self))

    def take(self, name: str, update: Bound) -> None:
        self.unbind(name)
        self.bound[name] = update
        self._gained |= update.gain is not None

    def unbind(self, name: str) -> None:
        self.siblings.forget(name)  # also if it is not here: sets that it is in are
        if self.bound.pop(name, None) and self._gained:
            self._gained = any(update.gain is not None for update in self.bound.values())

    def forward(self, x: Tensor) -> Tensor:  # [N, T, D] -> [N, T, O]
        fused = self._fused(x) if self.active.gates and self.bound else None
        y: Tensor = self.base(x) if fused is None else fused
        if not self.active.gates or not self.bound:
            return y
        if self.active.gates[0].part:
            return y + self._by_part(x, y)
        wx = y.clone() if self._gained else y
        for n, gates in enumerate(self.active.gates):
            if n == 0 and fused is not None:
                continue
            if not gates.keep:
                update = self._fresh(gates, x, wx)
                if update is not None and gates.span:
                    gates.rows(y).add_(update)
                elif update is not None:
                    y = y + update
                continue
            share = self.active.share(n, self, x)
            if share is None:
                continue
            if isinstance(share[1].b, Tiles):
                share[1].b.add(share[0], gates.rows(y))
            else:
                gates.rows(y).add_(self._grown(*share, gates, gates.rows(wx)))
        return y

    def _fused(self, x: Tensor) -> Tensor | None:
        """W x and the first gates' update as one product of few rows; None where that cannot be."""
        gates, *others = self.active.gates
        tiles = self.base.suiting(x) if isinstance(self.base, FrozenLinear) else None
        if tiles is None or gates.span or not gates.keep or (others and self._gained):
            return None
        share = self.active.share(0, self, x)
        if share is None:
            return tiles.product(x, self.base.bias)
        shrunk, part = share
        if not isinstance(part.b, Tiles):
            return None
        return tiles.product(x, self.base.bias, (shrunk, part.b))

    def _by_part(self, x: Tensor, y: Tensor) -> Tensor:
        """What the parts of the batch add to their W x; each pays for its own adapters alone."""
        parts = [gates.part for gates in self.active.gates if gates.part]
        by_row = (parts[-1][1], -1)
        xs, ys = (t.view(*by_row, t.shape[-1]) if t.dim() == 2 else t for t in (x, y))
        updates = []
        for gates, (start, stop) in zip(self.active.gates, parts, strict=True):
            rows, wx = xs[start:stop], ys[start:stop]
            update = self._fresh(gates, rows, wx)
            updates.append(torch.zeros_like(wx) if update is None else update)
        return torch.cat(updates).view_as(y)

    def _fresh(self, gates: Gates, x: Tensor, wx: Tensor) -> Tensor | None:
        """What factors that nobody keeps add, as in training; None if there are none.

        Where an adapter sees an input with gaps, so does the base under its gains: as DoRA's
        authors and PEFT have it.
        """
        block = stacked([self], gates.adapters)
        if block is None or block.parts[0] is None:
            return None
        x, wx, part = gates.rows(x), gates.rows(wx), block.parts[0]
        if gates.dropout:
            x = F.dropout(x, gates.dropout)
            wx = wx if part.gains is None else self.base(x)
        return self._grown(shrunk_by(x, block.a, scale_of(gates, block, x)), part, gates, wx)

    def _grown(self, shrunk: Tensor, part: Part, gates: Gates, wx: Tensor) -> Tensor:
        """What is added to W x, [.., O]: B, and the gains of DoRA."""
        assert isinstance(part.b, Tensor)
        update = product(shrunk, part.b)
        if part.gains is not None:
            plain = wx if self.base.bias is None else wx - self.base.bias
            gains = like(gates.weights, plain)[..., part.gain_owner].float() @ part.gains
            update = update + gains * plain
        return update if update.dtype == wx.dtype else update.to(wx.dtype)


class MixedModel:
    """A transformers model whose adapted layers are `MixedLinear`.

    Layers are wrapped when the first adapter reaches them, so an adapter costs nothing where it
    does not act. The model is changed in place and stays usable as it was: without active gates
    every layer is its base.
    """

    def __init__(self, model: PreTrainedModel, tiler: Tiler | None = None) -> None:
        self.model = model
        model.requires_grad_(False)
        self.active = ActiveMixes(tiler)
        self.layers: dict[str, MixedLinear] = {}
        self.digests: dict[str, str] = {}
        self.ranks: dict[str, int] = {}  # the largest of each adapter's
        self._bases = linear_layers(model)
        self._shapes = {name: shape(layer) for name, layer in self._bases.items()}
        self.sets = Sets(lambda: {layer.siblings: None for layer in self.layers.values()})

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
        device = self.model.device
        tiler = self.active.tiler
        updates = {
            name: bound(pair.to(dtype or pair.a.dtype, device), self._bases[name])
            for name, pair in adapter.pairs.items()
        }
        return {n: u.tiled(tiler) for n, u in updates.items()} if tiler else updates

    def take(self, name: str, digest: str, updates: Mapping[str, Bound]) -> None:
        """Make prepared updates available to gates."""
        self.unbind(name, missing_ok=True)
        for layer, update in updates.items():
            self._wrap(layer).take(name, update)
        self.digests[name] = digest
        self.ranks[name] = max((update.rank for update in updates.values()), default=0)

    def unbind(self, name: str, *, missing_ok: bool = False) -> None:
        if name not in self.digests and not missing_ok:
            raise UnknownAdapter(name, self.digests)
        for layer in self.layers.values():
            layer.unbind(name)
        self.sets.forget(name)
        self.digests.pop(name, None)
        self.ranks.pop(name, None)

    @contextmanager
    def output_at(self, wanted: Tensor) -> Iterator[None]:
        """The output layer sees the wanted positions [N, T] alone: its logits are [tokens, V].

        It is the largest matrix of a small model, and most positions of a row to learn are prompt.
        """
        model: Any = self.model
        head = model.get_output_embeddings()
        if head is None:
            kind = type(model).__name__
            raise BaseError(f"{kind} has no output layer; use a causal language model.")
        hook = head.register_forward_pre_hook(lambda _, given: (given[0][wanted], *given[1:]))
        try:
            yield
        finally:
            hook.remove()

    def release(self) -> None:
        """Put the base's own layers back; the model is as it was before it was wrapped."""
        for name, layer in self.layers.items():
            parent, _, child = name.rpartition(".")
            setattr(self.model.get_submodule(parent), child, layer.base)
        self.layers.clear()
        self.digests.clear()
        self.ranks.clear()

    def _wrap(self, name: str) -> MixedLinear:
        if name not in self.layers:
            parent, _, child = name.rpartition(".")
            owner = self.model.get_submodule(parent)
            base = getattr(owner, child)
            self.layers[name] = MixedLinear(base, self.active)
            setattr(owner, child, self.layers[name])
        return self.layers[name]


def linear_layers(model: nn.Module) -> dict[str, Layer]:
    """Every layer an adapter can act on, by name, wrapped already or not."""
    layers: dict[str, Layer] = {}
    for name, module in model.named_modules():
        if name.removesuffix(".base") in layers:
            continue  # inside a layer that another model wrapped
        if type(module) is nn.Linear or isinstance(module, (*KINDS, MixedLinear)):
            layers[name] = module
    return layers


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(O, D) of every layer an adapter can act on, by name."""
    return {name: shape(layer) for name, layer in linear_layers(model).items()}


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
