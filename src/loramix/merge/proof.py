"""The proof that a merge is the mix it was made of: logits of both, side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from loramix.adapter import Adapter
from loramix.base import Base, open_base
from loramix.formats import peft
from loramix.formats.aside import aside
from loramix.formats.folder import CONFIG, RECIPE
from loramix.gates import Gates
from loramix.lora import Pair
from loramix.merge.recipe import Recipe
from loramix.merge.registry import Outcome
from loramix.merge.rows import Rows
from loramix.merge.updates import Updates
from loramix.mix import Mix
from loramix.mixed import MixedModel

ROWS, TOKENS = 4, 16  # of the probe
WIDE = 64  # rows of a layer that are looked at


@dataclass(frozen=True, slots=True)
class Proof:
    """How far what was merged is from the mix it was made of.

    KL(mix || merged) of next tokens in nats over a probe of random tokens, beside KL(mix || base),
    the size of what the mix does at all; in float32. `alone` is the largest |merge(dW) - dW| / |dW|
    of a source by itself at weight one, by the same method: zero but for rounding, unless its
    settings drop something. None for a method that weighs by rows, and where all are DoRA.
    """

    mean_kl: float
    max_kl: float
    base_kl: float
    alone: float | None


def prove(
    base: str | Path, merged: str | Path, adapters: Mapping[str, Adapter], recipe: Recipe
) -> Proof:
    """Compare a merged model or adapter with the served mix; also written into its `merge.json`.

    For `sum` the distance is that of one rounding; another method is another model, and this says
    how different. Raises BaseError.
    """
    opened = open_base(str(base), dtype="float32")
    tokens = _probe(opened)
    plain = _logits(opened, tokens)
    served = _served(opened, adapters, recipe.mix, tokens)
    if (Path(merged) / CONFIG).exists():
        found = _served(
            opened, {"merged": peft.read(merged, name="merged")}, Mix({"merged": 1}), tokens
        )
    else:
        del opened
        found = _logits(open_base(str(merged), dtype="float32"), tokens)
    kl = _kl(served, found)
    base_kl = float(_kl(served, plain).mean())
    proof = Proof(float(kl.mean()), float(kl.max()), base_kl, _alone(adapters, recipe))
    file = Path(merged) / RECIPE
    told = json.loads(file.read_text("utf-8")) | {"proof": asdict(proof)}
    with aside(file, replace=True) as new:
        new.write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n", "utf-8")
    return proof


def _alone(adapters: Mapping[str, Adapter], recipe: Recipe) -> float | None:
    """The largest error over all sources, on the first rows of each layer."""
    if recipe.how.reads_inputs:
        return None
    errors = []
    for name in recipe.mix:
        kept = tuple(each for each in recipe.settings if each.name not in recipe.mix)
        single = replace(recipe, mix=Mix({name: 1}), settings=kept)
        for layer in adapters[name].pairs:
            updates = single.updates(layer, adapters)
            if updates.are_factors:
                errors.append(_error(updates, single.merged(updates)))
    return max(errors, default=None)


def _error(updates: Updates, merged: Outcome) -> float:
    rows = Rows(updates.view().read(0, min(WIDE, updates.shape[0])), 0)
    (wanted,) = rows.deltas
    found = merged.b[: len(wanted)] @ merged.a if isinstance(merged, Pair) else merged(rows)
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-30))


def _served(base: Base, adapters: Mapping[str, Adapter], mix: Mix, tokens: Tensor) -> Tensor:
    """The logits that the engine would give under the mix."""
    mixed = MixedModel(base.model)
    try:
        for name in mix:
            mixed.bind(adapters[name], base.dtype)
        weights = torch.tensor([[list(mix.values())]], device=base.device)
        with mixed.active.using(Gates(tuple(mix), weights.expand(len(tokens), 1, -1))):
            return _logits(base, tokens)
    finally:
        mixed.release()


def _probe(base: Base) -> Tensor:
    embedding = cast("torch.nn.Embedding", base.model.get_input_embeddings())
    generator = torch.Generator().manual_seed(0)
    shape = (ROWS, min(TOKENS, base.context))
    return torch.randint(len(embedding.weight), shape, generator=generator).to(base.device)


def _logits(base: Base, tokens: Tensor) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = base.model(input_ids=tokens, use_cache=False).logits
    return logits.double()


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of the next token in nats, [N, T]."""
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)
