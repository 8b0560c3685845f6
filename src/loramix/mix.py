"""A mix: sparse weights over adapters, with a name.

A mix is the one value all parts of the program share. A router predicts it, the engine applies
it, `merge` folds it into matrices, `search` looks for a better one, and the API takes its name
as the model:

    >>> mix = Mix.parse("summary:0.55+sentiment:0.45")
    >>> mix["summary"]
    0.55
    >>> str(0.5 * mix)
    'sentiment:0.225+summary:0.275'

For a frozen base matrix W and adapters with updates dW_i it means

    W(mix) = W + sum_i weight_i * dW_i

so the weights need not sum to one, may be negative, and the empty mix is the bare base.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping

from loramix.errors import MixSyntaxError

DECIMALS = 4  # weights are rounded to this, so that equal mixes have equal names
RESERVED = frozenset({"base", "auto"})  # "base" is Mix(); "auto" asks the router

_NAME = re.compile(r"(?=.*[a-z])[a-z0-9][a-z0-9._-]{0,63}")  # a bare number is never a name
_WEIGHT = re.compile(r"-?([0-9]+\.?[0-9]*|\.[0-9]+)")


def check_name(name: str) -> str:
    """`name` itself if it can name an adapter; MixSyntaxError if not.

    Numbers are refused because clients address adapters by index with them, as llama.cpp does.
    """
    if not _NAME.fullmatch(name) or name in RESERVED:
        raise MixSyntaxError(
            f"{_short(name)} cannot name an adapter; use up to 64 of a-z, 0-9, '.', '_', '-', "
            f"at least one letter, and not {' or '.join(sorted(RESERVED))}."
        )
    return name


def slug(text: str) -> str:
    """A hub id or a folder name as an adapter's name.

    >>> slug("Org/My Adapter-v2")
    'org-my-adapter-v2'
    >>> slug("007")
    'adapter-007'
    """
    name = re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-._")[:56].rstrip("-._")
    return name if _NAME.fullmatch(name) and name not in RESERVED else f"adapter-{name}".strip("-")


class Mix(Mapping[str, float]):
    """Weight of each adapter: immutable, hashable, in canonical form.

    Adapters are sorted by name, weights rounded, zeros dropped. Two mixes are equal exactly when
    their names are, so `str(mix)` can be a cache key, a log column and the API's model field.
    """

    __slots__ = ("_weights",)

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        canonical: dict[str, float] = {}
        for name, weight in sorted((weights or {}).items()):
            check_name(name)
            if not math.isfinite(weight):
                raise MixSyntaxError(f"The weight of {name!r} is {weight}; it must be finite.")
            if rounded := round(float(weight), DECIMALS):
                canonical[name] = rounded
        self._weights = canonical

    @classmethod
    def parse(cls, name: str) -> Mix:
        """Read a mix from its name; an adapter without a weight has weight one.

        >>> Mix.parse("sql") == Mix({"sql": 1})
        True
        >>> Mix.parse("base") == Mix()
        True
        """
        if name == "base":
            return cls()
        weights: dict[str, float] = {}
        for term in name.split("+"):
            adapter, colon, weight = term.partition(":")
            if adapter in weights:
                raise MixSyntaxError(
                    f"{_short(adapter)} appears twice in {_short(name)}; add its weights."
                )
            if colon and not _WEIGHT.fullmatch(weight):
                raise MixSyntaxError(
                    f"Expected 'adapter:weight' in {_short(name)}, got {_short(term)}."
                )
            weights[adapter] = float(weight) if colon else 1.0
        return cls(weights)

    def top(self, k: int) -> Mix:
        """The k adapters with the largest absolute weights; ties go to the first name."""
        ranked = sorted(self.items(), key=lambda item: -abs(item[1]))
        return Mix(dict(ranked[:k]))

    def __add__(self, other: Mix) -> Mix:
        return Mix({name: self.get(name, 0) + other.get(name, 0) for name in {*self, *other}})

    def __mul__(self, factor: float) -> Mix:
        return Mix({name: weight * factor for name, weight in self.items()})

    __rmul__ = __mul__

    def __getitem__(self, name: str) -> float:
        return self._weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def __hash__(self) -> int:
        return hash(tuple(self._weights.items()))

    def __str__(self) -> str:
        return "+".join(_term(*item) for item in self.items()) or "base"

    def __repr__(self) -> str:
        return f"Mix.parse({str(self)!r})"


def _term(name: str, weight: float) -> str:
    digits = f"{weight:.{DECIMALS}f}".rstrip("0").rstrip(".")
    return name if digits == "1" else f"{name}:{digits}"


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
