"""Routers that learn nothing: one mix for every query, or the mix of the patterns a query has.

They give no probability: a score is 1 where an adapter answers and 0 where it does not.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from loramix.chat import Message
from loramix.errors import LoramixError, RouteError
from loramix.mix import Mix, check_name
from loramix.route import Decision
from loramix.route.turns import user_turns


@dataclass(frozen=True)
class FixedRouter:
    """The same mix whatever is asked; the empty mix is the base."""

    mix: Mix

    @property
    def adapters(self) -> tuple[str, ...]:
        return tuple(sorted(self.mix))

    def route(self, messages: Sequence[Message]) -> Decision:
        """The mix. Raises RouteError without a user turn, as every router does."""
        started = time.perf_counter()
        user_turns(messages)
        return _decided(self.mix, self.adapters, ("fixed: every query",), started)

    def scores(self, queries: Sequence[str]) -> list[list[float]]:
        return [[1.0] * len(self.mix) for _ in queries]


@dataclass(frozen=True)
class RulesRouter:
    """Adapters by patterns, in their order: a query goes to the first whose pattern it has.

    With `every`, to all of them in equal shares. Where none is found the base answers.
    """

    rules: tuple[tuple[str, re.Pattern[str]], ...]  # adapter, what its queries have
    every: bool = False

    @classmethod
    def load(cls, path: Path) -> RulesRouter:
        """Read `{rules: {adapter: [pattern, ...]}, match: first | all}`, YAML or JSON.

        A pattern is a regular expression, found anywhere between two ends of words, in either case:
        a plain keyword is one. Raises RouteError.
        """
        try:
            data = yaml.safe_load(path.read_text("utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise RouteError(f"{path} cannot be read as rules: {_flat(error)}") from None
        if not isinstance(data, dict) or not data.keys() <= {"rules", "match"}:
            raise RouteError(f"{path}: expected a mapping with rules and, if you like, match.")
        if (match := data.get("match", "first")) not in ("first", "all"):
            raise RouteError(f"{path}: match is {match!r}; expected first or all.")
        rules = data.get("rules")
        if not isinstance(rules, dict) or not rules:
            raise RouteError(f"{path}: expected rules, a mapping of adapters to their patterns.")
        return cls(tuple(_rule(path, *item) for item in rules.items()), every=match == "all")

    @property
    def adapters(self) -> tuple[str, ...]:
        return tuple(sorted(name for name, _ in self.rules))

    def route(self, messages: Sequence[Message]) -> Decision:
        """By the last user turn; the empty mix where no pattern is found. Raises RouteError."""
        started = time.perf_counter()
        found = self._found(user_turns(messages)[-1])
        mix = Mix({name: 1 / len(found) for name, _ in found})
        reasons = tuple(f"{name}: has {text!r}" for name, text in found)
        return _decided(mix, self.adapters, reasons or ("base: no rule is met",), started)

    def scores(self, queries: Sequence[str]) -> list[list[float]]:
        """1 where an adapter answers, 0 where not."""
        found = [{name for name, _ in self._found(query)} for query in queries]
        return [[float(name in names) for name in self.adapters] for names in found]

    def _found(self, query: str) -> list[tuple[str, str]]:
        """The adapters that answer, each with the words that speak for it."""
        found = [(name, m[0]) for name, rule in self.rules if (m := rule.search(query))]
        return found if self.every else found[:1]


def _rule(path: Path, name: Any, patterns: Any) -> tuple[str, re.Pattern[str]]:
    given = [patterns] if isinstance(patterns, str) else patterns
    strings = isinstance(given, list) and all(isinstance(p, str) and p.strip() for p in given)
    if not strings or not given:
        raise RouteError(f"{path}: {name} needs a pattern or a list of them, none of them empty.")
    try:
        for pattern in given:
            re.compile(pattern)  # alone: parts that are only well-formed together are refused
        joined = "|".join(f"(?:{pattern})" for pattern in given)
        return check_name(name), re.compile(rf"(?<!\w)(?:{joined})(?!\w)", re.IGNORECASE)
    except (re.error, LoramixError, TypeError) as error:
        raise RouteError(f"{path}: the rule of {name} is wrong: {_flat(error)}") from None


def _decided(
    mix: Mix, adapters: Sequence[str], reasons: tuple[str, ...], started: float
) -> Decision:
    return Decision(
        mix=mix,
        scores={name: float(name in mix) for name in adapters},
        none=0.0 if mix else 1.0,
        reasons=reasons,
        latency_ms=(time.perf_counter() - started) * 1e3,
    )


def _flat(error: Exception) -> str:
    return " ".join(str(error).split())
