"""What the value of a key in a training file may be, and how it is read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Any, TypeAlias

from loramix.errors import TrainError

Choice: TypeAlias = Mapping[Any, str]  # what may stand there, and what it is called here


@dataclass(frozen=True, slots=True)
class Number:
    """At least `least` (`above`: more than it) and below `below`; whole if it is an int."""

    kind: type[int] | type[float]
    least: float = 0.0
    above: bool = False
    below: float = math.inf

    def __str__(self) -> str:
        what = "a whole number" if self.kind is int else "a number"
        most = f" and below {self.below:g}" if self.below < math.inf else ""
        return f"{what}, {'more than' if self.above else 'at least'} {self.least:g}{most}"

    def read(self, value: Any) -> float | None:
        """The number that a value stands for, if it is one that may be; YAML reads 1e-4 as text."""
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            return None
        try:
            number = float(value)
        except ValueError:
            return None
        enough = number > self.least if self.above else number >= self.least
        if not enough or not number < self.below or number != self.kind(number):
            return None
        return self.kind(number)


Kind: TypeAlias = type | UnionType | Number | Choice


def read(key: str, value: Any, kind: Kind) -> Any:
    """The value as one of its key's kind. Raises TrainError, naming the key as it was written."""
    found: Any
    if isinstance(kind, Number):
        found, expected = kind.read(value), str(kind)
    elif isinstance(kind, Mapping):
        found, expected = _chosen(value, kind), ", ".join(map(str, kind))
    elif kind is dict:
        found, expected = _options(value), "{option: value, ...}"
    elif kind is str:
        found, expected = _text(value), "text"
    else:
        found = value if isinstance(value, kind) else None
        expected = "true or false" if kind is bool else "true, false or a folder"
    if found is None:
        raise TrainError(f"{key} is {value!r}; expected {expected}.")
    return found


def _chosen(value: Any, choices: Choice) -> str | None:
    """A list of one is that one, and YAML reads a plain no as false."""
    only = value[0] if isinstance(value, list) and len(value) == 1 else value
    only = "no" if only is False else only
    return choices.get(only) if isinstance(only, (str, int)) else None


def _text(value: Any) -> str | None:
    """Numbers are names too, and a list is one as a command line has it."""
    if isinstance(value, list) and all(isinstance(v, (str, int, float)) for v in value):
        return ",".join(map(str, value))
    known = isinstance(value, (str, int, float)) and not isinstance(value, bool)
    return str(value) if known else None


def _options(value: Any) -> dict[str, Any] | None:
    """An object, or one as JSON, as on a command line."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            return None
    return value if isinstance(value, dict) else None
