"""Linear layers in which every row of the batch has its own mix.

    y = W x + ((x A^T) * g) B^T          A [R, D]   B [O, R]   g [.., R]

A and B hold the adapters present in the batch side by side, R is the sum of their ranks, and
g gives each rank column the weight its row gives to the adapter that owns it. A new mix is a new
row of weights: no merge, no load. The engine serves through these layers and training learns
through them, so what was trained is what is served.

Side by side suits tokens of many requests, a few each. A long prompt has its own span of the row,
and its own gates: it pays for the adapters of its mix alone.

DoRA stays exact. With c = magnitude / |W + b a| per output, its update is
dW x = c * (b a x) + (c - 1) * (W x): c is folded into b when the adapter is bound to the layer,
and c - 1 is kept as the adapter's `gain`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loramix.adapter import Adapter
from loramix.errors import BaseMismatch, UnknownAdapter
from loramix.lora import Pair, dora_gain

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_BLOCKS = 16  # sets of adapters whose side-by-side factors a layer remembers


@dataclass(frozen=True, slots=True)
class Gates:
    """Mixes of a forward pass: which adapters, and each row's weight for each of them.

    They hold for all tokens, or for those of `span`: then the other tokens see none of these
    adapters and do not pay for them.
    """

    adapters: tuple[str, ...]  # K names
    weights: Tensor  # [N, T, K], or [N, 1, K] when a row keeps one mix; T of the span, if given
    dropout: float = 0.0  # share of the input that no adapter sees, while training
    span: tuple[int, int] | None = None  # first token and the one after the last


class ActiveMixes:
    """The gates of the batch now in flight, shared by all layers of one model.

    Handed to each layer when the model is wrapped, so there is no module global: two engines can
    live in one process, and a test needs no reset.
    """

    gates: tuple[Gates, ...] = ()

    @contextmanager
    def using(self, *gates: Gates) -> Iterator[None]:
        """Gates of one forward pass; with several, each has a span and the spans are apart."""
        assert not self.gates, "forward passes do not nest"
        self.gates = gates
        try:
            yield
        finally:
            self.gates = ()


@dataclass(frozen=True, slots=True)
class Bound:
    """One adapter's update as this layer applies it."""

    a: Tensor  # [R, D]
    b: Tensor  # [O, R], a DoRA magnitude folded in
    gain: Tensor | None  # [O], what DoRA adds to W x


@dataclass(frozen=True, slots=True)
class Block:
    """The bound updates of several adapters side by side."""

    a: Tensor  # [R, D]
    b: Tensor  # [O, R]
    owner: Tensor  # [R], the gate column that weighs each rank column
    gains: Tensor | None  # [K', O]
    gain_owner: Tensor  # [K']


class MixedLinear(nn.Module):
    """A frozen linear layer (`nn.Linear` or GPT-2's `Conv1D`) and the adapters bound to it."""

    def __init__(self, base: nn.Linear | Conv1D | MixedLinear, active: ActiveMixes) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.active = active
        self.bound: dict[str, Bound] = {}
        self._blocks: dict[tuple[str, ...], Block | None] = {}

    @property
    def weight(self) -> Tensor:
        """The base matrix as [O, D], whichever way the layer stores it."""
        return self.base.weight.T if isinstance(self.base, Conv1D) else self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def bind(self, name: str, pair: Pair) -> None:
        """Take one adapter's update; the tensors keep their dtype, autograd reaches them."""
        pair = pair.to(pair.a.dtype, self.base.weight.device)
        if pair.magnitude is None:
            self.bound[name] = Bound(pair.a, pair.b, None)
        else:
            scale = dora_gain(pair, self.weight)
            self.bound[name] = Bound(pair.a, (scale[:, None] * pair.b).to(pair.b.dtype), scale - 1)
        self._blocks.clear()

    def unbind(self, name: str) -> None:
        self.bound.pop(name, None)
        self._blocks.clear()

    def forward(self, x: Tensor) -> Tensor:  # [N, T, D] -> [N, T, O]
        y: Tensor = self.base(x)
        for gates in self.active.gates:
            if (block := self._block(gates.adapters)) is None:
                continue
            if gates.span is None:
                y = y + self._update(x, y, gates, block)
            else:
                part = y[..., slice(*gates.span), :]
                update = self._update(x[..., slice(*gates.span), :], part, gates, block)
                part += update.view(part.shape)  # OPT's layers take tokens without a batch
        return y

    def _update(self, x: Tensor, y: Tensor, gates: Gates, block: Block) -> Tensor:
        """What the adapters add to the base's y, [N, T, O]."""
        scale = gates.weights[..., block.owner]  # [N, T, R]
        if gates.dropout:
            x = F.dropout(x, gates.dropout)
        shrunk = F.linear(x.to(block.a.dtype), block.a)
        if shrunk.dtype == torch.float16:  # past 65504 it is inf, and inf * 0 would be NaN
            shrunk = shrunk.masked_fill(scale == 0, 0)
        update = F.linear(shrunk * scale.to(block.a.dtype), block.b)
        if block.gains is not None:
            wx = y if self.base.bias is None else y - self.base.bias
            update = update + (gates.weights[..., block.gain_owner].float() @ block.gains) * wx
        return update.to(y.dtype)

    def _block(self, names: tuple[str, ...]) -> Block | None:
        """The factors of these adapters side by side; None if none of them touches this layer."""
        if names not in self._blocks:
            block = self._stack(names)
            if block is not None and block.a.requires_grad:
                return block  # factors in training change at every step
            if len(self._blocks) >= MAX_BLOCKS:
                self._blocks.pop(next(iter(self._blocks)))
            self._blocks[names] = block
        return self._blocks[names]

    def _stack(self, names: tuple[str, ...]) -> Block | None:
        here = [(k, self.bound[name]) for k, name in enumerate(names) if name in self.bound]
        if not here:
            return None
        device = self.base.weight.device
        columns = torch.tensor([k for k, _ in here], device=device)
        ranks = torch.tensor([bound.a.shape[0] for _, bound in here], device=device)
        gained = [(k, bound.gain) for k, bound in here if bound.gain is not None]
        if len(here) == 1:
            a, b = here[0][1].a, here[0][1].b
        else:  # adapters of different precision meet in the widest
            dtype = max((bound.a.dtype for _, bound in here), key=lambda d: d.itemsize)
            a = torch.cat([bound.a.to(dtype) for _, bound in here])
            b = torch.cat([bound.b.to(dtype) for _, bound in here], dim=1)
        return Block(
            a,
            b,
            columns.repeat_interleave(ranks),
            torch.stack([gain for _, gain in gained]) if gained else None,
            torch.tensor([k for k, _ in gained], device=device, dtype=torch.long),
        )


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

    def bind(self, adapter: Adapter, dtype: torch.dtype | None = None) -> None:
        """Make an adapter available to gates, in `dtype` or its own precision.

        Raises BaseMismatch, naming the strays, if a tensor finds no layer of its shape; the model
        is then left as it was. Binding a name again replaces it.
        """
        check_fit(adapter, self._shapes)
        self.unbind(adapter.name, missing_ok=True)
        for layer, pair in adapter.pairs.items():
            self._wrap(layer).bind(adapter.name, pair if dtype is None else pair.to(dtype))
        self.digests[adapter.name] = adapter.digest

    def unbind(self, name: str, *, missing_ok: bool = False) -> None:
        if name not in self.digests and not missing_ok:
            raise UnknownAdapter(name, self.digests)
        for layer in self.layers.values():
            layer.unbind(name)
        self.digests.pop(name, None)

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
        if isinstance(module, Conv1D):
            shapes[name] = (module.weight.shape[1], module.weight.shape[0])
        elif type(module) is nn.Linear:
            shapes[name] = (module.out_features, module.in_features)
        elif isinstance(module, MixedLinear):
            shapes[name] = (module.weight.shape[0], module.weight.shape[1])
    return shapes


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
