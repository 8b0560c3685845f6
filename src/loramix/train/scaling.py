"""Gradients in float16: the loss is scaled up before they are taken, and they down after.

Below 6e-8 float16 has no numbers, and gradients are often smaller (section 3.2 of
https://arxiv.org/abs/1710.03740). Scales are powers of two, so that scaling rounds nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

# as torch's GradScaler has them
FIRST = 2.0**16
HELD_STEPS = 2000  # after which the scale is doubled


@dataclass(slots=True)
class LossScale:
    """The scale of one expert's loss; 1 where nothing is in 16 bits."""

    value: float = 1.0
    num_held: int = 0  # steps since it changed

    @classmethod
    def of(cls, dtype: torch.dtype) -> LossScale:
        """For a base in this precision; bfloat16 has the range of float32."""
        return cls(FIRST if dtype == torch.float16 else 1.0)

    def lowered(self, weights: Iterable[Tensor]) -> bool:
        """Halve it if these weights' gradients went beyond 16 bits: they are to be taken anew."""
        if self.value <= 1 or _are_finite(weights):
            return False
        self.value, self.num_held = self.value / 2, 0
        return True

    def undo(self, weights: Iterable[Tensor]) -> None:
        """Make the gradients those of the loss itself. The scale grows after some that held."""
        if self.value == 1:
            return
        for weight in weights:
            if weight.grad is not None:
                weight.grad /= self.value
        self.num_held += 1
        if self.num_held == HELD_STEPS:
            self.value, self.num_held = 2 * self.value, 0


def _are_finite(weights: Iterable[Tensor]) -> bool:
    return all(w.grad is None or bool(torch.isfinite(w.grad).all()) for w in weights)
