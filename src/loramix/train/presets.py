"""How strongly an expert biases the base, as keys that a training file could have by hand.

What an expert changes beyond its own task grows with how far its update goes, so a preset sets
that: alpha over rank, the epochs, and the rank, which bounds what is learned
(https://arxiv.org/abs/2405.09673). The learning rate hangs on the base and is left as it is, and
all linear layers are adapted. `python -m recipes.pocket presets` measures what comes of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loramix.errors import TrainError


@dataclass(frozen=True, slots=True)
class Preset:
    """What a preset sets unless it is said outright."""

    rank: int
    ratio: float  # of alpha to the rank
    epochs: float

    def keys(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """As keys of a training file, for an expert that has these."""
        rank = values.get("lora_rank", self.rank)
        every = {
            "lora_rank": rank,
            "lora_alpha": self.ratio * rank,
            "num_train_epochs": self.epochs,
        }
        return {key: value for key, value in every.items() if key not in values}


PRESETS = {
    "gentle": Preset(rank=8, ratio=1, epochs=2),
    "balanced": Preset(rank=16, ratio=2, epochs=3),
    "override": Preset(rank=32, ratio=4, epochs=5),
}


def with_preset(values: Mapping[str, Any]) -> dict[str, Any]:
    """An expert's keys, and beside them those of the preset that they name, if any. TrainError."""
    return {**_set(values), **values}


def told(name: str, values: Mapping[str, Any]) -> list[str]:
    """A line on what the preset of an expert's keys sets, if they name one."""
    if "preset" not in values:
        return []
    listed = ", ".join(f"{key} {value:g}" for key, value in _set(values).items())
    return [f"{name}: the preset {values['preset']} sets {listed or 'nothing, as all is given'}."]


def _set(values: Mapping[str, Any]) -> dict[str, Any]:
    name = values.get("preset")
    if name is None:
        return {}
    if name not in PRESETS:
        raise TrainError(f"preset is {name!r}; expected {', '.join(PRESETS)}.")
    return PRESETS[name].keys(values)
