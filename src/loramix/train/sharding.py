"""A base spread over the processes of a run, each of which holds a part of every matrix (FSDP).

torch's `fully_shard` (https://arxiv.org/abs/2304.11277) gathers the matrices of a layer when they
are needed, in the forward pass and again in the backward one, and forgets them behind it. The
experts' factors are small and are not spread; their gradients are summed as ever. As all processes
gather together, each must compute as many batches as the others: one with fewer rows adds idle
ones, of which nothing is learned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from loramix.base import Base
from loramix.errors import TrainError
from loramix.train.batches import IGNORED, Batch
from loramix.train.config import Settings
from loramix.train.processes import Processes


def shard(base: Base) -> None:
    """Spread a base over the processes that are together, layer by layer, for good.

    On GPUs a base that was opened on the CPU is moved there, a layer at a time.
    """
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if base.quantized != "none":
        raise TrainError(f"fsdp spreads no {base.quantized} matrices; drop quantization_bit or it.")
    kind = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    mesh = init_device_mesh(kind, (distributed.get_world_size(),))
    for layer in base.model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    fully_shard(base.model, mesh=mesh, reshard_after_forward=True)  # what is in no layer


def check_shardable(settings: Mapping[str, Settings]) -> None:
    """TrainError for experts, by name, that read whole matrices of the base."""
    for name, own in settings.items():
        if own.dora or own.start != "default":
            what = "use_dora" if own.dora else f"{own.start}_init"
            raise TrainError(
                f"{name}: {what} reads whole matrices, which fsdp spreads; drop one of them."
            )


def in_step(batches: Sequence[Batch], experts: int, processes: Processes) -> list[Batch]:
    """As many batches as any process has, idle ones at the end."""
    missing = processes.most(len(batches)) - len(batches)
    return [*batches, *[_idle(experts)] * missing]


def _idle(experts: int) -> Batch:
    """A row of the first expert, nothing of which is learned."""
    ids = torch.zeros(1, 2, dtype=torch.long)
    return Batch(
        ids=ids,
        positions=torch.arange(2)[None],
        labels=torch.full_like(ids, IGNORED),
        counts=(1, *[0] * (experts - 1)),
        rows=((0, 0, 2),),
    )
