"""The loss of finished experts, each row under a mix of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from loramix.adapter import Adapter
from loramix.base import Base
from loramix.gates import Gates
from loramix.mix import Mix
from loramix.mixed import MixedModel
from loramix.train.batches import micro_batches
from loramix.train.data import Row, total_learned
from loramix.train.forward import losses

TOKENS = 16384  # of a batch


def mean_loss(
    base: Base, adapters: Sequence[Adapter], rows: Sequence[Row], mixes: Sequence[Mix]
) -> float:
    """Nats per learned token over `rows`, each under the mix beside it. UnknownAdapter."""
    groups: dict[Mix, list[Row]] = {}
    for row, mix in zip(rows, mixes, strict=True):
        groups.setdefault(mix, []).append(row)
    mixed = MixedModel(base.model)
    try:
        for adapter in adapters:
            mixed.bind(adapter)
        total = sum(_summed(mixed, mix, group) for mix, group in groups.items())
    finally:
        mixed.release()
    return total / total_learned(rows)


@torch.no_grad()
def _summed(mixed: MixedModel, mix: Mix, rows: Sequence[Row]) -> float:
    weights = torch.tensor([[list(mix.values())]], device=mixed.model.device)
    gates = [Gates(tuple(mix), weights)] if mix else []
    total = 0.0
    for batch in micro_batches([rows], tokens=TOKENS):
        with mixed.active.using(*gates):
            total += losses(mixed, batch)[0].item()
    return total
