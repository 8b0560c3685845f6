"""Factors for updates that have none: a DoRA as a plain LoRA, a fine-tuned model as an adapter.

Neither is exactly of low rank, so a rank is chosen and the error is measured and said. One layer is
in memory at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from loramix.adapter import Adapter, Card
from loramix.errors import AdapterError, BaseMismatch
from loramix.formats.checkpoint import Checkpoint, skeleton
from loramix.formats.keys import summary
from loramix.formats.peft import digest
from loramix.lora import Pair, compress
from loramix.mix import check_name
from loramix.mixed import linear_shapes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SPARE, SWEEPS = 16, 6  # columns and passes more than a randomised SVD needs to come close


@dataclass(frozen=True, slots=True)
class Approximated:
    """An adapter and how far its updates are from what they stand for, |D - b a| and |D| each."""

    adapter: Adapter
    norms: Mapping[str, tuple[float, float]]

    @property
    def error(self) -> float:
        """Of all layers together, as a share of the whole update (Frobenius)."""
        lost, whole = zip(*self.norms.values(), strict=True)
        return math.hypot(*lost) / math.hypot(*whole)

    @property
    def worst(self) -> tuple[str, float]:
        """The layer that lost the largest share of its own update."""
        shares = {name: lost / whole for name, (lost, whole) in self.norms.items() if whole}
        return max(shares.items(), key=lambda item: item[1])


def closest(delta: Tensor, rank: int, *, exact: bool = False) -> tuple[Pair, tuple[float, float]]:
    """The pair of at most `rank` closest to `delta` [O, D], and |delta - b a|, |delta|.

    By a randomised SVD (https://arxiv.org/abs/0909.4061), which is within a fraction of a percent
    of the best; `exact` takes the whole SVD, as do small matrices anyway.
    """
    if rank < 1:
        raise AdapterError(f"A rank is at least 1, not {rank}.")
    delta = delta.float()
    columns = min(rank + SPARE, *delta.shape)
    if exact or 4 * columns >= min(delta.shape):
        u, s, vt = torch.linalg.svd(delta, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(delta, columns, niter=SWEEPS)
        vt = v.T
    root = s[:rank].clamp(min=0).sqrt()
    pair = Pair((root[:, None] * vt[:rank]).contiguous(), (u[:, :rank] * root).contiguous())
    return pair, ((delta - pair.b @ pair.a).norm().item(), delta.norm().item())


def compressed(adapter: Adapter, rank: int) -> Approximated:
    """The closest adapter of at most `rank`, by the SVD of its factors; DoRA is refused."""
    pairs, norms = {}, {}
    for layer, pair in adapter.pairs.items():
        if pair.magnitude is not None:
            raise AdapterError(f"{layer} is a DoRA, which has no rank; make it plain first.")
        wide = pair.to(torch.float32)
        small = compress(wide, rank) if pair.rank > rank else wide
        lost = 0.0 if small is wide else _distance(wide, small)
        pairs[layer], norms[layer] = small, (lost, _distance(wide, None))
    return Approximated(replace(adapter, pairs=pairs, digest=digest(pairs)), norms)


def without_dora(
    adapter: Adapter, base: Checkpoint, rank: int, *, exact: bool = False
) -> Approximated:
    """An adapter whose DoRA updates are plain ones of at most `rank`; the others stay as they are.

    Raises BaseMismatch if a layer is not the base's.
    """
    turned = _layers(base.config)
    pairs, norms = {}, {}
    for layer, pair in adapter.pairs.items():
        if pair.magnitude is None:
            pairs[layer], norms[layer] = pair, (0.0, _distance(pair, None))
            continue
        weight = _weight(base, layer, turned)
        if weight.shape != (len(pair.b), pair.a.shape[1]):
            raise BaseMismatch(
                f"{layer} is {list(weight.shape)} in {base.folder}, the update "
                f"{[len(pair.b), pair.a.shape[1]]}; give the base it was trained on."
            )
        delta = pair.to(torch.float32).delta(weight)
        pairs[layer], norms[layer] = closest(delta, rank, exact=exact)
    return Approximated(replace(adapter, pairs=pairs, digest=digest(pairs)), norms)


def extract(
    tuned: Checkpoint,
    base: Checkpoint,
    rank: int,
    name: str,
    *,
    exact: bool = False,
    lora_only: bool = False,
) -> Approximated:
    """What fine-tuning changed in the linear layers, as an adapter of at most `rank`.

    Other tensors that changed (norms, embeddings, biases) are refused by name, or left out with
    `lora_only`. Raises BaseMismatch if the two are of different shapes, AdapterError if nothing
    changed.
    """
    if tuned.shapes() != base.shapes():
        raise BaseMismatch(
            f"{tuned.folder} and {base.folder} hold different tensors or shapes; give the base it "
            f"was fine-tuned from."
        )
    turned = _layers(base.config)
    layers = {layer for layer in turned if f"{layer}.weight" in base.files}
    strays = list(_changed_beside(tuned, base, {f"{layer}.weight" for layer in layers}))
    if strays and not lora_only:
        raise AdapterError(
            f"Fine-tuning changed more than linear layers: {summary(strays)}; leave that out with "
            f"lora_only, and the adapter is the less for it."
        )
    pairs, norms = {}, {}
    for layer in sorted(layers):
        delta = _weight(tuned, layer, turned) - _weight(base, layer, turned)
        if delta.any():
            pairs[layer], norms[layer] = closest(delta, rank, exact=exact)
    if not pairs:
        raise AdapterError(f"{tuned.folder} and {base.folder} have the same linear layers.")
    card = Card(check_name(name), f"Extracted from {tuned.folder.resolve().name} at rank {rank}")
    return Approximated(Adapter(name, pairs, digest(pairs), card), norms)


def _distance(pair: Pair, other: Pair | None) -> float:
    """|b a - b' a'|, or |b a| alone, from R by R products, whose squares cancel: in float64."""
    a, b = pair.a.double(), pair.b.double()
    if other is not None:
        a = torch.cat([a, other.a.double()])
        b = torch.cat([b, -other.b.double()], dim=1)
    square = ((b.T @ b) * (a @ a.T)).sum().item()
    return math.sqrt(max(square, 0.0))


def _changed_beside(tuned: Checkpoint, base: Checkpoint, linear: set[str]) -> Iterator[str]:
    for name in sorted(base.files.keys() - linear):
        if not torch.equal(tuned.tensor(name).float(), base.tensor(name).float()):
            yield name


def _layers(config: PreTrainedConfig) -> dict[str, bool]:
    """Every linear layer of the base, and whether its weight is stored as [D, O]."""
    from transformers.pytorch_utils import Conv1D

    model = skeleton(config)
    return {name: isinstance(model.get_submodule(name), Conv1D) for name in linear_shapes(model)}


def _weight(checkpoint: Checkpoint, layer: str, turned: Mapping[str, bool]) -> Tensor:
    """[O, D] in float32; BaseMismatch if the base has no such layer."""
    if layer not in turned or f"{layer}.weight" not in checkpoint.files:
        raise BaseMismatch(f"{checkpoint.folder} has no linear layer {layer}; give its own base.")
    stored = checkpoint.tensor(f"{layer}.weight").float()
    return stored.T if turned[layer] else stored
