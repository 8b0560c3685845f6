"""The settings of one expert's training, and of the run that trains it with others."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loramix.errors import TrainError
from loramix.train.processes import Processes
from loramix.train.schedule import OPTIONS, Place, check_schedule, share

OPTIMIZERS = ("adamw", "adamw8bit", "sgd")
STARTS = ("default", "pissa", "olora")
MEASURES = ("loss", "accuracy")

CHOICES = {"schedule": OPTIONS, "optimizer": OPTIMIZERS, "start": STARTS, "best_by": MEASURES}


@dataclass(frozen=True, slots=True)
class Settings:
    """How an expert learns. Raises TrainError for a value that cannot work.

    `alpha` has no place in a finished pair; while learning, LoRA's scale alpha / rank (rsLoRA:
    alpha / sqrt(rank)) stands before the product, as in every other trainer.
    """

    rank: int = 16
    alpha: float | None = None  # None: 2 * rank
    rslora: bool = False
    dora: bool = False
    targets: tuple[str, ...] = ("all-linear",)  # or names of layers: ("q_proj", "v_proj")
    start: str = "default"  # or pissa, olora: the rank is then doubled when the expert is saved
    rate: float = 1e-3
    b_ratio: float = 1.0  # LoRA+: how much faster b learns than a, and DoRA's magnitudes
    schedule: str = "cosine"  # one of schedule.OPTIONS
    schedule_options: Mapping[str, Any] = field(default_factory=dict)
    warmup: float = 0.05  # below 1 a share of the steps, else their number
    epochs: float = 3
    max_steps: int | None = None  # instead of epochs
    batch_size: int = 16  # rows of one optimizer step
    shuffled: bool = True  # anew in every epoch; else in the order of the file
    optimizer: str = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    max_norm: float = 1.0  # of this expert's gradient, clipped; inf: never
    dropout: float = 0.0  # share of each adapted layer's input that its pair does not see
    noise: float = 0.0  # NEFTune's alpha: in the embeddings, while learning
    validate_every: float | None = None  # steps, or a share of all; None: once an epoch
    patience: int | None = None  # validations without a better one, after which it stops
    keep_best: bool = True  # the state that validates best, not the last one
    best_by: str = "loss"  # or accuracy, of single tokens
    max_length: int = 1024  # tokens of a row
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rank", "rate", "b_ratio", "epochs", "batch_size", "max_length"):
            if not 0 < getattr(self, name) < math.inf:
                raise TrainError(f"{name} is {getattr(self, name)}; expected more than 0.")
        for name in ("alpha", "max_steps", "max_norm", "validate_every", "patience"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise TrainError(f"{name} is {value}; expected more than 0.")
        for name in ("weight_decay", "warmup", "noise"):
            if not 0 <= getattr(self, name) < math.inf:
                raise TrainError(f"{name} is {getattr(self, name)}; expected at least 0.")
        if not 0 <= self.dropout < 1:
            raise TrainError(f"dropout is {self.dropout}; expected 0 to below 1.")
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise TrainError(f"{name} is {getattr(self, name)!r}; expected {', '.join(known)}.")
        if self.dora and self.start != "default":
            raise TrainError(f"DoRA cannot start from {self.start}; drop one of the two.")
        check_schedule(self.schedule, self.schedule_options)

    @property
    def scale(self) -> float:
        """What stands before b @ a."""
        alpha = 2 * self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def num_steps(self, num_rows: int) -> int:
        if self.max_steps is not None:
            return self.max_steps
        return max(1, math.ceil(self.epochs * self.steps_per_epoch(num_rows) - 1e-9))

    def steps_per_epoch(self, num_rows: int) -> int:
        return math.ceil(num_rows / self.batch_size)

    def rate_at(self, step: int, num_steps: int) -> float:
        """The rate of step 0, 1, ...: up to the full one, then down along the schedule."""
        warmup = self.warmup * num_steps if self.warmup < 1 else self.warmup
        if step < warmup:
            return self.rate * (step + 1) / (warmup + 1)
        at = Place(step, warmup, num_steps, self.rate)
        return self.rate * share(self.schedule, self.schedule_options, at)


def every_steps(every: float, num_steps: int) -> int:
    """A number of steps that is given as such, or as a share of all of them, below 1."""
    return math.ceil(every * num_steps) if every < 1 else int(every)


def never() -> bool:
    return False


@dataclass(frozen=True, slots=True)
class Run:
    """What the experts of one pass share: how much of them is computed at once, and the folder.

    A step's rows are computed in micro-batches; their size changes memory and speed, no result.
    """

    micro_tokens: int = 8192  # of a micro-batch, padding counted
    micro_rows: int | None = None  # at most so many in it, of whichever experts
    bf16: bool = False  # matrix products in bfloat16, weights and optimizer in float32
    checkpointing: bool = False  # keep no activations between layers; a third more time
    packing: bool = False  # short rows of one expert behind each other in one
    folder: Path | None = None  # of checkpoints; goes on from the newest if there are any
    resume_from: Path | None = None  # a checkpoint to go on from, instead of the newest one
    save_every: float | None = (
        None  # rounds, or a share of all; None: when an expert is validated, or would be
    )
    keep: int = 2  # newest checkpoints kept
    sharded: bool = False  # the base lies in parts on them; else whole on each
    processes: Processes = field(default_factory=Processes)  # that compute it, each a part
    stopped: Callable[[], bool] = never  # asked after every round

    def __post_init__(self) -> None:
        for name in ("micro_tokens", "micro_rows", "keep"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise TrainError(f"{name} is {value}; expected at least 1.")
        if self.save_every is not None and not self.save_every > 0:
            raise TrainError(f"save_every is {self.save_every}; expected more than 0.")
