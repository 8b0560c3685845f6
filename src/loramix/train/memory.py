"""What a run will need of memory, told before it starts."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from loramix.base import Base
from loramix.train.config import Run, Settings
from loramix.train.start import chosen_layers

SAVED = 16  # activations of a layer that the gradient needs, in hidden sizes a token


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes, by what they are for. A rule of thumb: activations differ between architectures."""

    base: int
    experts: int  # factors, gradients and what Adam remembers, in float32
    activations: int  # of one micro-batch, logits included

    @property
    def total(self) -> int:
        return self.base + self.experts + self.activations

    def __str__(self) -> str:
        parts = (("base", self.base), ("experts", self.experts), ("activations", self.activations))
        listed = ", ".join(f"{name} {size / 2**20:,.0f}" for name, size in parts)
        return f"about {self.total / 2**20:,.0f} MiB ({listed})"


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


def estimate(base: Base, settings: Sequence[Settings], run: Run, longest: int) -> Estimate:
    """For experts with these settings, whose longest row has so many tokens."""
    config = base.model.config.get_text_config()
    hidden, layers = config.hidden_size, config.num_hidden_layers
    size = base.dtype.itemsize
    rows = run.micro_rows or run.micro_tokens // longest
    tokens = min(run.micro_tokens, max(1, rows) * longest)
    kept = (layers + SAVED) if run.checkpointing else layers * SAVED
    logits = 3 * 4 * tokens * config.vocab_size
    weights = sum(num_trained(base, one) for one in settings)
    return Estimate(
        base=sum(p.numel() * p.element_size() for p in base.model.parameters()),
        experts=16 * weights,
        activations=tokens * hidden * kept * size + logits,
    )
