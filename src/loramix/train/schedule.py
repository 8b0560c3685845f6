"""How a rate goes once it is warm: transformers' schedules, by their names and with their options.

Each is a share of the full rate, as a function of the step; `reduce_lr_on_plateau` and `greedy`,
which look at the loss, are none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loramix.errors import TrainError

# what each may be told (lr_scheduler_kwargs), and what holds unless it is; None: as the code says
OPTIONS: dict[str, dict[str, Any]] = {
    "linear": {},
    "cosine": {"num_cycles": 0.5},
    "constant": {},
    "cosine_with_restarts": {"num_cycles": 1},
    "cosine_with_min_lr": {"num_cycles": 0.5, "min_lr": None, "min_lr_rate": None},
    "polynomial": {"lr_end": 1e-7, "power": 1.0},
    "inverse_sqrt": {"timescale": None},
    "warmup_stable_decay": {
        "num_decay_steps": None,
        "num_stable_steps": None,
        "decay_type": "cosine",
        "min_lr_ratio": 0.0,
        "num_cycles": 0.5,
    },
}
DECAYS = ("cosine", "linear", "1-sqrt")


@dataclass(frozen=True, slots=True)
class Place:
    """A step of a run, counted from 0, past its warm-up."""

    step: int
    warmup: float
    num_steps: int
    rate: float  # the full one

    @property
    def done(self) -> float:
        """The share of the steps behind the warm-up that are over."""
        return (self.step - self.warmup) / max(1, self.num_steps - self.warmup)


def check_schedule(name: str, options: Mapping[str, Any]) -> None:
    """TrainError for options that the schedule does not have, lacks, or cannot work with."""
    for key, value in options.items():
        if key not in OPTIONS[name]:
            known = ", ".join(OPTIONS[name]) or "none"
            raise TrainError(f"lr_scheduler_kwargs has {key!r}; the schedule {name} takes {known}.")
        if key == "decay_type":
            if value not in DECAYS:
                raise TrainError(f"decay_type is {value!r}; expected {', '.join(DECAYS)}.")
        elif isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
            raise TrainError(f"{key} of lr_scheduler_kwargs is {value!r}; expected a number >= 0.")
    least = [key for key in ("min_lr", "min_lr_rate") if key in options]
    if name == "cosine_with_min_lr" and len(least) != 1:
        raise TrainError(f"{name} needs one of min_lr and min_lr_rate in lr_scheduler_kwargs.")
    if name == "warmup_stable_decay" and "num_decay_steps" not in options:
        raise TrainError(f"{name} needs num_decay_steps in lr_scheduler_kwargs.")


def share(name: str, options: Mapping[str, Any], at: Place) -> float:
    """How much of the full rate is left at a step past the warm-up."""
    told: dict[str, Any] = {**OPTIONS[name], **options}
    match name:
        case "linear":
            return 1 - at.done
        case "cosine":
            return _cosine(at.done, told["num_cycles"])
        case "cosine_with_restarts":
            over = at.done >= 1
            return 0.0 if over else _cosine(told["num_cycles"] * at.done % 1.0, 0.5)
        case "cosine_with_min_lr":
            least = options.get("min_lr_rate", options.get("min_lr", 0.0) / at.rate)
            return _between(least, _cosine(at.done, told["num_cycles"]))
        case "polynomial":
            left = max(0.0, 1 - at.done) ** told["power"]
            return _between(told["lr_end"] / at.rate, left)
        case "inverse_sqrt":
            scale = told["timescale"] or at.warmup or 10_000
            return math.sqrt(scale / (at.step - at.warmup + scale))
        case "warmup_stable_decay":
            return _stable_then(told, at)
    return 1.0


def _cosine(done: float, cycles: float) -> float:
    return max(0.0, 0.5 * (1 + math.cos(math.pi * 2 * cycles * done)))


def _between(least: float, share: float) -> float:
    """A share of what is above the least."""
    return least + (1 - least) * share


def _stable_then(told: Mapping[str, Any], at: Place) -> float:
    """The full rate for a while, down to the least within some steps, and that to the end."""
    falling = told["num_decay_steps"]
    stable = told["num_stable_steps"]
    if stable is None:
        stable = at.num_steps - at.warmup - falling
    done = (at.step - at.warmup - stable) / max(1, falling)
    if done < 0:
        return 1.0
    if done >= 1:
        return _between(told["min_lr_ratio"], 0.0)
    left = {
        "cosine": _cosine(done, told["num_cycles"]),
        "linear": 1 - done,
        "1-sqrt": 1 - math.sqrt(done),
    }[told["decay_type"]]
    return _between(told["min_lr_ratio"], left)
