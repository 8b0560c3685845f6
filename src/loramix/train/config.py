"""The settings of one expert's training."""

from __future__ import annotations

import math
from dataclasses import dataclass

from loramix.errors import TrainError


@dataclass(frozen=True, slots=True)
class Settings:
    """How an expert learns. Raises TrainError for a value that cannot work.

    `alpha` has no place in a finished pair; here it says how much faster b learns than a. Under
    Adam, training b with LoRA's scale alpha / rank in front of it and rate r is the same as
    training the product with rate r * alpha / rank.
    """

    rank: int = 16
    alpha: float | None = None  # None: 2 * rank
    rate: float = 1e-3
    epochs: float = 3
    batch_size: int = 16  # rows of one optimizer step
    warmup: float = 0.05  # share of the steps; then the rate falls to nothing along a cosine
    dropout: float = 0.0  # share of each adapted layer's input that its pair does not see
    weight_decay: float = 0.0
    max_norm: float = 1.0  # of the gradient, clipped
    max_length: int = 1024  # tokens of a row
    bf16: bool = False  # matrix products in bfloat16, weights and optimizer in float32
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rank", "rate", "epochs", "batch_size", "max_norm", "max_length"):
            if not 0 < getattr(self, name) < math.inf:
                raise TrainError(f"{name} is {getattr(self, name)}; expected more than 0.")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise TrainError(f"alpha is {self.alpha}; expected more than 0.")
        if not 0 <= self.weight_decay < math.inf:
            raise TrainError(f"weight_decay is {self.weight_decay}; expected at least 0.")
        for name in ("warmup", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise TrainError(f"{name} is {getattr(self, name)}; expected 0 to below 1.")

    @property
    def b_rate(self) -> float:
        return self.rate * (2.0 if self.alpha is None else self.alpha / self.rank)
