"""The proof that a merge is the mix it was made of: logits of both, side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from loramix.adapter import Adapter
from loramix.base import Base, open_base
from loramix.formats.aside import aside
from loramix.formats.folder import RECIPE
from loramix.mix import Mix
from loramix.mixed import Gates, MixedModel

ROWS, TOKENS = 4, 16  # of the probe


@dataclass(frozen=True, slots=True)
class Proof:
    """How far a merged model's next-token distributions are from those of the served mix.

    KL(mix || merged) in nats over a probe of random tokens, beside KL(mix || base), the size of
    what the mix does at all. All in float32.
    """

    mean_kl: float
    max_kl: float
    base_kl: float


def prove(base: str | Path, merged: str | Path, adapters: Mapping[str, Adapter], mix: Mix) -> Proof:
    """Open both models and compare; the result is also written into the merged `merge.json`.

    For `sum` the distance is that of one rounding; another method is another model, and this says
    how different. Raises BaseError.
    """
    opened = open_base(str(base), dtype="float32")
    tokens = _probe(opened)
    plain = _logits(opened, tokens)
    served = _served(opened, adapters, mix, tokens)
    del opened
    found = _logits(open_base(str(merged), dtype="float32"), tokens)
    kl = _kl(served, found)
    proof = Proof(float(kl.mean()), float(kl.max()), float(_kl(served, plain).mean()))
    file = Path(merged) / RECIPE
    told = json.loads(file.read_text("utf-8")) | {"proof": asdict(proof)}
    with aside(file, replace=True) as new:
        new.write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n", "utf-8")
    return proof


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
