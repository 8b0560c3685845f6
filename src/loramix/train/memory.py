"""What a run will need of memory, told before it starts."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from loramix.adapter import Card
from loramix.base import Base
from loramix.mixed import MixedModel
from loramix.train.batches import Batch, collate, micro_batches
from loramix.train.config import Run, Settings
from loramix.train.data import Row
from loramix.train.forward import gates, judged_batches, losses
from loramix.train.learner import Course, Learner
from loramix.train.start import chosen_layers

PROBE = 64  # tokens of which it is measured what a forward pass keeps
# bytes of a weight that is learned: itself, its gradient, and what the optimizer remembers
OF_WEIGHT = {"adamw": 16, "adamw8bit": 10, "sgd": 12}


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes, by what they are for, beside those of the program itself."""

    base: int
    experts: int  # factors, gradients, what the optimizer remembers, and the best state
    activations: int  # of the largest micro-batch, logits included

    @property
    def total(self) -> int:
        return self.base + self.experts + self.activations

    def __str__(self) -> str:
        parts = (("base", self.base), ("experts", self.experts), ("activations", self.activations))
        listed = ", ".join(f"{name} {size / 2**20:,.0f}" for name, size in parts)
        return f"about {self.total / 2**20:,.0f} MiB ({listed})"

    def warning(self, free: int | None) -> str:
        """A sentence if what is still to come does not fit into what is free; else nothing."""
        wanted = self.experts + self.activations
        if free is None or wanted <= free:
            return ""
        return (
            f"{wanted / 2**20:,.0f} MiB more are needed and {free / 2**20:,.0f} are free: {LEVERS}."
        )


LEVERS = (
    "pull one of these levers, best first: gradient_checkpointing: true, a smaller "
    "per_device_train_batch_size with more gradient_accumulation_steps, a smaller cutoff_len, "
    "bf16: true, quantization_bit: 4, optim: adamw_8bit, a smaller base"
)


def used_bytes() -> int:
    """The most that this process has used so far: of the GPU's memory if there is one, else of RAM.

    Zero where the system does not tell.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return 0
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def num_trained(base: Base, settings: Settings) -> int:
    """Parameters that an expert with these settings learns."""
    layers = chosen_layers(base.model, settings.targets).values()
    magnitudes = sum(out for out, _ in layers) if settings.dora else 0
    return sum(settings.rank * (out + into) for out, into in layers) + magnitudes


def free_bytes(base: Base) -> int | None:
    """What the device of a base has left; None where the system does not tell."""
    if base.device.type == "cuda":
        return int(torch.cuda.mem_get_info(base.device)[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as told:
            found = dict(line.split(":", 1) for line in told)
    except OSError:
        return None
    return int(found["MemAvailable"].split()[0]) * 1024


def estimate(
    base: Base,
    settings: Sequence[Settings],
    run: Run,
    rows: Sequence[Sequence[Row]],
    validation: Sequence[Sequence[Row]] = (),
) -> Estimate:
    """For experts with these settings, rows, and rows to be validated on.

    What a forward pass keeps for the gradient differs between architectures and versions, so it is
    measured on a few tokens, and scaled to the micro-batch of the longest rows.
    """
    config = base.model.config.get_text_config()
    weights = [num_trained(base, one) for one in settings]
    worst = settings[weights.index(max(weights))]
    kept = _kept(base, worst, rows[0][0])
    layer = kept / config.num_hidden_layers  # of the gradient, or of what is computed again
    if run.checkpointing:
        kept = config.num_hidden_layers * config.hidden_size * base.dtype.itemsize
    size = base.dtype.itemsize
    logit = size + 4 * (size < 4)  # as computed, and as the loss takes it
    judged = [_longest(judged_batches(base.model, own)) for own in validation if own]
    whole = sum(p.nbytes for p in (*base.model.parameters(), *base.model.buffers()))
    return Estimate(
        base=whole // run.processes.count if run.sharded else whole,
        experts=sum(
            count * (OF_WEIGHT[one.optimizer] + 4 * one.keep_best)
            for count, one in zip(weights, settings, strict=True)
        ),
        activations=max(
            [_bytes(_largest(rows, run), kept, layer, (logit + 8) * config.vocab_size)]
            + [_bytes(batch, 0, layer, (logit + 4) * config.vocab_size) for batch in judged]
        ),
    )


def _bytes(batch: Batch, kept: float, layer: float, logits: int) -> int:
    """The most that a batch takes at once: what a token keeps, and a layer of it or the loss.

    Those two do not meet: the loss's gradient is gone when that of the last layer begins.
    """
    tokens, learned = batch.ids.numel(), int((batch.labels >= 0).sum())
    return round(tokens * kept + max(tokens * layer, learned * logits))


def _largest(rows: Sequence[Sequence[Row]], run: Run) -> Batch:
    """The micro-batch with the longest rows of all experts."""
    most = run.micro_rows or run.micro_tokens
    longest = sorted(_all(rows), key=lambda row: -len(row.ids))[:most]
    return _longest(
        micro_batches([longest], tokens=run.micro_tokens, rows=run.micro_rows, packing=run.packing)
    )


def _longest(batches: Sequence[Batch]) -> Batch:
    return max(batches, key=lambda batch: batch.ids.numel())


def _all(rows: Sequence[Sequence[Row]]) -> list[Row]:
    return [row for own in rows for row in own]


def _kept(base: Base, settings: Settings, row: Row) -> float:
    """Bytes a token that autograd keeps of a forward pass, beside weights; logits apart."""
    mixed = MixedModel(base.model)
    probe = Row((row.ids * PROBE)[:PROBE], ((PROBE - 1, PROBE),))
    own = Course(Card("probe"), [probe], (), replace(settings, start="default", patience=None))
    learner = Learner(own, mixed)
    weights = [*base.model.parameters(), *base.model.buffers(), *learner.weights.values()]
    known = {weight.untyped_storage().data_ptr() for weight in weights}
    found: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    batch = collate([probe])
    try:
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            mixed.active.using(*gates([learner], batch.counts, learning=True)),
        ):
            kept = losses(mixed, batch)  # while it lives, so does what it keeps
        del kept
    finally:
        mixed.release()
    return sum(found.values()) / PROBE
