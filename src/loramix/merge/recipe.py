"""What to merge and how: a mix, a method, and its settings for all layers or some.

A setting is written `name=value`, or `name@place=value` for some layers only, a range of blocks
("0-15") or a part of the layer's name ("q_proj", "self_attn"); the last one that fits counts. Its
name is a parameter of the method, or an adapter, whose weight it then is there:

    density=0.3    density@mlp=0.5    sql@0-15=0.2
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from loramix.adapter import Adapter
from loramix.errors import MergeError
from loramix.merge.methods import Method, find
from loramix.merge.moments import Moments
from loramix.merge.registry import Outcome
from loramix.merge.updates import Updates, Weight
from loramix.mix import Mix

_RANGE = re.compile(r"(\d+)-(\d+)")
_BLOCK = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Setting:
    """A number for the layers at `place`, or for all."""

    name: str
    value: float
    place: str = ""

    @classmethod
    def parse(cls, text: str) -> Setting:
        """Read `name=value` or `name@place=value`; MergeError if it is neither."""
        left, equals, number = text.rpartition("=")
        name, _, place = left.partition("@")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if not (equals and name and math.isfinite(value)):
            raise MergeError(f"Expected name=number or name@place=number, got {text!r}.")
        return cls(name.strip(), value, place.strip())

    def fits(self, layer: str) -> bool:
        """Whether it is for this layer."""
        if bounds := _RANGE.fullmatch(self.place):
            block = _BLOCK.search(layer)
            return block is not None and int(bounds[1]) <= int(block[1]) <= int(bounds[2])
        return not self.place or f".{self.place}." in f".{layer}."

    def __str__(self) -> str:
        return f"{self.name}{'@' if self.place else ''}{self.place}={self.value:g}"


@dataclass(frozen=True, slots=True)
class Recipe:
    """A mix and how its updates become one; MergeError if it cannot be followed."""

    mix: Mix
    method: str = "sum"
    settings: tuple[Setting, ...] = ()
    seed: int = 0
    moments: Moments | None = None  # of the inputs, for methods that read them

    def __post_init__(self) -> None:
        if not self.mix:
            raise MergeError(
                "The mix is the bare base, so there is nothing to merge; name adapters."
            )
        self._check_moments()
        parameters = self.how.defaults
        for setting in self.settings:
            if setting.name not in parameters and setting.name not in self.mix:
                known = ", ".join([*parameters, *self.mix])
                raise MergeError(
                    f"{self.method} has no setting {setting.name!r}; expected one of {known}."
                )
            if setting.name in parameters and setting.name in self.mix:
                raise MergeError(
                    f"{setting.name!r} is a setting of {self.method} and an adapter; rename it."
                )

    def _check_moments(self) -> None:
        """MergeError for moments that the method does not read, or of another mix."""
        if self.moments is None:
            return
        if not self.how.reads_inputs:
            raise MergeError(f"{self.method} weighs by no rows; leave them out, or use regmean.")
        if tuple(self.moments.num_tokens) != tuple(self.mix):
            raise MergeError(
                f"The rows were run under {', '.join(self.moments.num_tokens)}, and {self.mix} is "
                f"to be merged; run them under the adapters of the mix."
            )

    @property
    def how(self) -> Method:
        return find(self.method)

    def check_places(self, layers: Iterable[str]) -> None:
        """MergeError if a setting is for layers that are not there."""
        layers = list(layers)
        for setting in self.settings:
            if not any(setting.fits(layer) for layer in layers):
                raise MergeError(
                    f"The setting {setting} fits none of the {len(layers)} layers; expected a "
                    f"range of blocks like 0-15, or a part of a name like {layers[0]}."
                )

    def updates(
        self, layer: str, adapters: Mapping[str, Adapter], base: Weight | None = None
    ) -> Updates:
        """What the adapters of the mix have for a layer, in float32."""
        weights = dict(self.mix) | self._fitting(layer, self.mix)
        pairs = (adapters[name].pairs.get(layer) for name in self.mix)
        single = tuple(pair.to(torch.float32) if pair else None for pair in pairs)
        tensor = torch.tensor([weights[name] for name in self.mix], dtype=torch.float64)
        inputs = self.moments.by_layer[layer] if self.moments else None
        return Updates(layer, tuple(self.mix), tensor, single, base, self.seed, inputs)

    def merged(self, updates: Updates) -> Outcome:
        """The updates of a layer as one."""
        settings = dict(self.how.defaults) | self._fitting(updates.layer, self.how.defaults)
        return self.how.apply(updates, **settings)

    def describe(self) -> dict[str, Any]:
        """For the files that say how something was made."""
        return {
            "mix": str(self.mix),
            "method": self.method,
            "source": self.how.source,
            "settings": dict(self.how.defaults)
            | {str(s).rpartition("=")[0]: s.value for s in self.settings},
            "seed": self.seed,
        } | (self.moments.describe() if self.moments else {})

    def _fitting(self, layer: str, names: Iterable[str]) -> dict[str, float]:
        wanted = set(names)
        return {s.name: s.value for s in self.settings if s.name in wanted and s.fits(layer)}


def settings_of(given: Mapping[str, float] | Iterable[str]) -> tuple[Setting, ...]:
    """Settings from {"density@mlp": 0.3}, or from texts."""
    if isinstance(given, Mapping):
        given = [f"{name}={value}" for name, value in given.items()]
    return tuple(Setting.parse(text) for text in given)
