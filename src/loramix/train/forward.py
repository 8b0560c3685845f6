"""The loss of a batch that holds rows of several experts, each row under its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from loramix.errors import TrainError
from loramix.gates import Gates
from loramix.mixed import MixedModel
from loramix.train.batches import IGNORED, Batch, micro_batches
from loramix.train.data import Row
from loramix.train.learner import Learner

JUDGED_TOKENS = 16384  # of a batch whose loss is only measured, if its logits are no more than
JUDGED_LOGITS = 1 << 27


def gates(learners: Sequence[Learner], counts: Sequence[int], *, learning: bool) -> list[Gates]:
    """Each expert's rows see its update alone, weighed by LoRA's scale."""
    here = [(k, count) for k, count in enumerate(counts) if count]
    stops = list(accumulate(count for _, count in here))
    starts = [0, *stops[:-1]]
    found = []
    for (k, _), start, stop in zip(here, starts, stops, strict=True):
        learner = learners[k]
        weight = torch.full((1, 1, 1), learner.gate, device=learner.mixed.model.device)
        dropout = learner.course.settings.dropout if learning else 0.0
        part = (start, stop) if len(here) > 1 else None
        found.append(Gates((learner.name,), weight, dropout, part=part))
    return found


def losses(mixed: MixedModel, batch: Batch, *, bf16: bool = False) -> list[Tensor]:
    """Cross-entropy in nats, summed over the learned tokens of each expert.

    Under gates that are active, and for as long as its gradient is to be taken: layers whose
    activations are computed anew need the gates then too.
    """
    logits, labels, lines = _predicted(mixed, batch, bf16=bf16)
    each = F.cross_entropy(logits.float(), labels, reduction="none")
    stops = list(accumulate(batch.counts, initial=0))
    tokens = [sum(lines[a:b]) for a, b in pairwise(stops)]
    return [part.sum() for part in each.split_with_sizes(tokens)]


def known(mixed: MixedModel, batch: Batch, *, bf16: bool = False) -> tuple[float, float]:
    """The cross-entropy of all learned tokens, and the lines' shares of first choices, summed."""
    logits, labels, lines = _predicted(mixed, batch, bf16=bf16)
    loss = F.cross_entropy(logits.float(), labels, reduction="sum")
    hits = (logits.argmax(1) == labels).double()
    shares = [part.mean().item() for part in hits.split_with_sizes(lines) if len(part)]
    return loss.item(), sum(shares)


def _predicted(mixed: MixedModel, batch: Batch, *, bf16: bool) -> tuple[Tensor, Tensor, list[int]]:
    """Logits [L, V] and labels [L] of the learned tokens, and how many of them each line has."""
    device = mixed.model.device
    labels = batch.labels.to(device)
    learned = labels != IGNORED
    with (
        mixed.output_at(learned),
        torch.autocast(device.type, torch.bfloat16, enabled=bf16),
    ):
        logits = mixed.model(
            input_ids=batch.ids.to(device),
            position_ids=batch.positions.to(device),
            use_cache=False,
        ).logits
    return logits, labels[learned], learned.sum(1).tolist()


def judged_batches(model: PreTrainedModel, rows: Sequence[Row]) -> list[Batch]:
    """Rows whose loss is only measured, in batches that nothing but the base decides.

    Whatever else is trained, figures are the same; the logits of a large vocabulary stay below
    a gigabyte.
    """
    size = model.config.get_text_config().vocab_size
    return micro_batches([rows], tokens=min(JUDGED_TOKENS, max(1, JUDGED_LOGITS // size)))


@torch.no_grad()
def check_packing(model: nn.Module) -> None:
    """TrainError if rows behind each other in one line see each other in this model.

    Most models of transformers tell them apart by their positions; some read no positions.
    """
    ids = torch.arange(5, 13, device=next(model.parameters()).device)[None]
    packed = torch.arange(4, device=ids.device).repeat(2)[None]
    alone = model(input_ids=ids[:, 4:], position_ids=packed[:, 4:], use_cache=False).logits
    behind = model(input_ids=ids, position_ids=packed, use_cache=False).logits[:, 4:]
    if (alone - behind).abs().max() > 0.01 * alone.abs().max():
        raise TrainError(
            f"Packed rows would see each other in {type(model).__name__}; train it without packing."
        )


@contextmanager
def rounded_products(*, wanted: bool | None) -> Iterator[None]:
    """Float32 products of a GPU round their factors to ten bits (TF32), or do not.

    Raises TrainError where that is wanted and cannot be; without a wish torch's setting holds.
    """
    able = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    if wanted and not able:
        raise TrainError("tf32 needs an NVIDIA GPU since Ampere, and there is none; drop it.")
    before = torch.get_float32_matmul_precision()
    if wanted is not None and able:
        torch.set_float32_matmul_precision("high" if wanted else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def recomputed(model: nn.Module) -> Iterator[None]:
    """Layers keep their input alone and are computed again for the gradient.

    transformers' own switch works in training mode only, which would turn on the base's dropout.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise TrainError(
            f"{type(model).__name__} has no layers that can be computed again; train it without "
            f"gradient checkpointing."
        )
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
