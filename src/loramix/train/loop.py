"""The training loop: one expert learned through `MixedLinear` over a frozen base.

The loss is the mean over the batch's answer tokens. The best state by validation loss is kept.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from loramix.adapter import Adapter, Card
from loramix.base import Base
from loramix.errors import TrainError
from loramix.formats.peft import digest
from loramix.lora import Pair
from loramix.mixed import Gates, MixedModel, linear_shapes
from loramix.train.config import Settings
from loramix.train.data import IGNORED, Batch, Row, batches, collate

EVAL_BATCH = 64  # rows


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a training run is; given to the caller after every optimizer step."""

    step: int
    num_steps: int
    loss: float  # nats per answer token, of this step's rows
    tokens_per_s: float
    validation: float | None = None  # nats per answer token, when just measured


def train(
    base: Base,
    card: Card,
    rows: Sequence[Row],
    validation: Sequence[Row],
    settings: Settings,
    report: Callable[[Progress], None] = lambda progress: None,
) -> Adapter:
    """Learn an expert named by `card` from `rows`; the state with the lowest validation loss.

    The base is wrapped while it learns and given back as it was, frozen. Raises TrainError if there
    is nothing to learn or the loss stops being a number.
    """
    if not rows or not validation:
        raise TrainError(f"{len(rows)} rows to train, {len(validation)} to validate; need both.")
    torch.manual_seed(settings.seed)
    mixed = MixedModel(base.model)
    pairs = new_pairs(linear_shapes(base.model), settings.rank, base.device)
    mixed.bind(Adapter(card.name, pairs, "in training", card))
    try:
        best = _fit(mixed, card.name, pairs, rows, validation, settings, report)
    finally:
        mixed.release()
    return Adapter(card.name, best, digest(best), card)


def new_pairs(
    shapes: dict[str, tuple[int, int]], rank: int, device: torch.device | str = "cpu"
) -> dict[str, Pair]:
    """Fresh pairs for all linear layers but the output layer: a Kaiming-uniform, b zero.

    The initialisation of LoRA (https://arxiv.org/abs/2106.09685, as in its reference code). They
    must lie where the base does: a layer would learn through a copy of pairs from elsewhere.
    """
    pairs = {}
    for name, (out, into) in shapes.items():
        if name.rpartition(".")[2] in ("lm_head", "embed_out"):
            continue
        bound = 1 / math.sqrt(into)
        a = torch.empty(rank, into).uniform_(-bound, bound).to(device)
        b = torch.zeros(out, rank, device=device)
        pairs[name] = Pair(a.requires_grad_(), b.requires_grad_())
    return pairs


def _fit(
    mixed: MixedModel,
    name: str,
    pairs: dict[str, Pair],
    rows: Sequence[Row],
    validation: Sequence[Row],
    settings: Settings,
    report: Callable[[Progress], None],
) -> dict[str, Pair]:
    optimizer = _optimizer(pairs, settings)
    per_epoch = math.ceil(len(rows) / settings.batch_size)
    num_steps = max(1, round(settings.epochs * per_epoch))
    best, best_loss = pairs, math.inf
    began, tokens = time.monotonic(), 0
    for step, batch in enumerate(_endless(rows, settings)):
        _set_rate(optimizer, settings, step, num_steps)
        loss = _step(mixed, name, batch, optimizer, settings)
        tokens += int(batch.mask.sum())
        speed = tokens / (time.monotonic() - began)
        progress = Progress(step + 1, num_steps, loss, speed)
        last = step + 1 == num_steps
        if last or (step + 1) % per_epoch == 0:
            measured = validation_loss(mixed, name, validation, settings)
            progress = replace(progress, validation=measured)
            if measured < best_loss:
                best_loss, best = measured, _copy(pairs)
        report(progress)
        if last:
            return best
    raise AssertionError("batches never end")


def _endless(rows: Sequence[Row], settings: Settings) -> Iterator[Batch]:
    rng = random.Random(settings.seed)
    while True:
        yield from batches(rows, settings.batch_size, rng)


def _step(
    mixed: MixedModel,
    name: str,
    batch: Batch,
    optimizer: torch.optim.Optimizer,
    settings: Settings,
) -> float:
    loss = answer_loss(mixed, name, batch, settings, dropout=settings.dropout)
    loss.backward()  # type: ignore[no-untyped-call]
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    torch.nn.utils.clip_grad_norm_(weights, settings.max_norm)
    optimizer.step()
    optimizer.zero_grad()
    value = loss.detach().item()
    if not math.isfinite(value):
        raise TrainError(f"The loss of {name!r} became {value}; lower the rate.")
    return value


def answer_loss(
    mixed: MixedModel, name: str, batch: Batch, settings: Settings, dropout: float = 0.0
) -> Tensor:
    """Mean cross-entropy in nats over the answer tokens of a batch."""
    device = mixed.model.device
    labels = batch.labels.to(device)
    gates = Gates((name,), torch.ones(len(labels), 1, 1, device=device), dropout)
    with (
        mixed.active.using(gates),
        torch.autocast(device.type, torch.bfloat16, enabled=settings.bf16),
    ):
        logits = mixed.model(
            input_ids=batch.ids.to(device),
            attention_mask=batch.mask.to(device),
            position_ids=batch.positions.to(device),
            logits_to_keep=batch.num_last + 1,
            use_cache=False,
        ).logits
    learned = labels != IGNORED
    return F.cross_entropy(logits[:, :-1][learned].float(), labels[learned])


@torch.no_grad()
def validation_loss(mixed: MixedModel, name: str, rows: Sequence[Row], settings: Settings) -> float:
    """Nats per answer token over all of `rows`."""
    total, count = 0.0, 0
    ordered = sorted(rows, key=lambda row: len(row.ids))
    for start in range(0, len(ordered), EVAL_BATCH):
        part = ordered[start : start + EVAL_BATCH]
        learned = sum(row.num_learned for row in part)
        total += answer_loss(mixed, name, collate(part), settings).item() * learned
        count += learned
    return total / count


def _optimizer(pairs: dict[str, Pair], settings: Settings) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        [
            {"params": [pair.a for pair in pairs.values()], "full_rate": settings.rate},
            {"params": [pair.b for pair in pairs.values()], "full_rate": settings.b_rate},
        ],
        lr=settings.rate,
        weight_decay=settings.weight_decay,
        fused=True,
    )


def _set_rate(
    optimizer: torch.optim.Optimizer, settings: Settings, step: int, num_steps: int
) -> None:
    warmup = settings.warmup * num_steps
    if step < warmup:
        share = (step + 1) / (warmup + 1)
    else:
        share = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (num_steps - warmup)))
    for group in optimizer.param_groups:
        group["lr"] = group["full_rate"] * share


def _copy(pairs: dict[str, Pair]) -> dict[str, Pair]:
    return {
        name: Pair(pair.a.detach().clone(), pair.b.detach().clone()) for name, pair in pairs.items()
    }
