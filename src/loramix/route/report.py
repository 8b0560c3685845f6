"""How well a router decides on labelled rows: one pass over them, then plain figures.

A row belongs to one adapter, to several (a query that asks for two skills), or to none. The first
adapter of a mix is its largest weight. Intervals are percentile bootstraps over rows (Efron 1979),
always with the same random numbers.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from loramix.chat import Message
from loramix.errors import BadRequest
from loramix.route import Decision, Router

NONE = "(none)"
RESAMPLES = 1000
BINS = 15


class Row(NamedTuple):
    """One conversation and the adapters it should reach; an empty set means the base."""

    messages: tuple[Message, ...]
    routes: frozenset[str]

    @property
    def text(self) -> str:
        return next(m.content for m in reversed(self.messages) if m.role == "user")


class Verdict(NamedTuple):
    """A row and what a router made of it."""

    row: Row
    decision: Decision
    ms: float  # wall time of the call

    @property
    def first(self) -> str:
        """The adapter with the largest weight, or NONE."""
        return next(iter(self.decision.mix.top(1)), NONE)

    @property
    def truth(self) -> str:
        return "+".join(sorted(self.row.routes)) or NONE

    @property
    def right(self) -> bool:
        """Exactly the adapters of the row, and no other; the base where there are none."""
        return frozenset(self.decision.mix) == self.row.routes

    @property
    def hit(self) -> bool:
        """The first choice is one of the row's; the base where there are none."""
        return self.first in (self.row.routes or {NONE})


class Figure(NamedTuple):
    """A mean with its 95 % interval; NaN where no row has a say."""

    value: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, hits: Sequence[bool] | NDArray[np.bool_]) -> Figure:
        found = np.asarray(hits, float)
        if not len(found):
            return cls(math.nan, math.nan, math.nan, 0)
        picks = np.random.default_rng(0).integers(0, len(found), (RESAMPLES, len(found)))
        low, high = np.quantile(found[picks].mean(axis=1), [0.025, 0.975])
        return cls(float(found.mean()), float(low), float(high), len(found))


class RouteFigures(NamedTuple):
    """How one adapter, or NONE, fares among all rows of one route or none."""

    precision: float
    recall: float
    f1: float
    n: int


@dataclass(frozen=True, slots=True)
class Report:
    """What a router did with labelled rows, in shares of one."""

    accuracy: Figure  # all rows: exactly the right adapters, or the base
    in_scope: Figure  # rows of one adapter: it is the first choice
    none_recall: Figure  # rows of none: left to the base
    none_precision: Figure  # rows left to the base: they are of none
    none_auroc: float  # does P(none) part the two
    false_second: Figure  # rows of one adapter: a second one joined
    mix_exact: Figure  # rows of several adapters: exactly these
    mix_first: Figure  # rows of several adapters: the first choice is one of them
    calibration_error: float  # rows of one adapter: of the best one's probability if one fits
    coverage: tuple[tuple[float, float], ...]  # share of rows answered, surest first; accuracy
    reliability: tuple[tuple[float, float, int], ...]  # said, true, rows of each bin
    routes: dict[str, RouteFigures]
    confusion: dict[str, dict[str, int]]  # truth -> first choice -> rows
    confused: tuple[tuple[str, str, tuple[str, ...]], ...]  # truth, choice, queries; worst first
    p50_ms: float
    p95_ms: float


def judge(
    router: Router, rows: Sequence[Row], known: Collection[str] | None = None
) -> list[Verdict]:
    """Route every row, one after another. BadRequest for a label that is not known.

    What the router can choose is known, unless something else is said to be.
    """
    if not rows:
        raise BadRequest("No rows to evaluate on; expected one labelled query at least.")
    sound = frozenset(router.adapters if known is None else known)
    for row in rows:
        if strange := sorted(row.routes - sound):
            raise BadRequest(
                f"A row is labelled {strange[0]!r}, which the router cannot choose; it knows "
                f"{', '.join(sorted(sound))}."
            )
    return [_timed(router, row) for row in rows]


def _timed(router: Router, row: Row) -> Verdict:
    start = time.perf_counter()
    decision = router.route(row.messages)
    return Verdict(row, decision, 1e3 * (time.perf_counter() - start))


def report(verdicts: Sequence[Verdict]) -> Report:
    single = [v for v in verdicts if len(v.row.routes) == 1]
    several = [v for v in verdicts if len(v.row.routes) > 1]
    nobody = [v for v in verdicts if not v.row.routes]
    based = [v for v in verdicts if not v.decision.mix]
    spans = np.array([v.ms for v in verdicts])
    reliability = _reliability(single)
    return Report(
        accuracy=Figure.of([v.right for v in verdicts]),
        in_scope=Figure.of([v.hit for v in single]),
        none_recall=Figure.of([v.hit for v in nobody]),
        none_precision=Figure.of([not v.row.routes for v in based]),
        none_auroc=auroc([v.decision.none for v in nobody], [v.decision.none for v in single]),
        false_second=Figure.of([len(v.decision.mix) > 1 for v in single]),
        mix_exact=Figure.of([v.right for v in several]),
        mix_first=Figure.of([v.hit for v in several]),
        calibration_error=_calibration_error(reliability),
        coverage=_coverage(single),
        reliability=reliability,
        routes=_by_route([*single, *nobody]),
        confusion=_confusion(verdicts),
        confused=_confused(verdicts),
        p50_ms=float(np.quantile(spans, 0.5)),
        p95_ms=float(np.quantile(spans, 0.95)),
    )


def difference(first: Sequence[Verdict], second: Sequence[Verdict]) -> Figure:
    """How much more often the second is right, on the same rows, resampled together."""
    gains = np.array([b.right - a.right for a, b in zip(first, second, strict=True)], float)
    return Figure.of(cast(NDArray[np.bool_], gains))


def auroc(high: Iterable[float], low: Iterable[float]) -> float:
    """Chance that one of `high` exceeds one of `low`, ties half; NaN if either is empty.

    >>> auroc([3, 2], [1, 2])
    0.875
    """
    ours, theirs = np.array(list(high), float), np.sort(np.array(list(low), float))
    if not len(ours) or not len(theirs):
        return math.nan
    below = np.searchsorted(theirs, ours, "left") + np.searchsorted(theirs, ours, "right")
    return float(below.mean() / 2 / len(theirs))


def _best(verdict: Verdict) -> tuple[str, float]:
    """The likeliest adapter, and its probability if one of them fits."""
    scores = verdict.decision.scores
    name = max(scores, key=lambda each: scores[each])
    return name, scores[name] / (sum(scores.values()) or 1.0)


def _coverage(single: Sequence[Verdict]) -> tuple[tuple[float, float], ...]:
    ranked = sorted(single, key=lambda v: -_best(v)[1])
    hits = np.array([_best(v)[0] in v.row.routes for v in ranked], float)
    counts = sorted({math.ceil(len(ranked) * share / 20) for share in range(1, 21)} - {0})
    return tuple((n / len(ranked), float(hits[:n].mean())) for n in counts)


def _reliability(single: Sequence[Verdict]) -> tuple[tuple[float, float, int], ...]:
    """Said and true share of hits among rows whose best adapter is about equally sure."""
    said = np.array([_best(v)[1] for v in single])
    true = np.array([_best(v)[0] in v.row.routes for v in single])
    place = np.minimum((said * BINS).astype(int), BINS - 1)
    bins = [place == each for each in range(BINS)]
    return tuple(
        (float(said[b].mean()), float(true[b].mean()), int(b.sum())) for b in bins if b.any()
    )


def _calibration_error(reliability: Sequence[tuple[float, float, int]]) -> float:
    total = sum(n for *_, n in reliability)
    return sum(abs(said - true) * n for said, true, n in reliability) / total if total else math.nan


def _by_route(verdicts: Sequence[Verdict]) -> dict[str, RouteFigures]:
    truths, choices = Counter(v.truth for v in verdicts), Counter(v.first for v in verdicts)
    hits = Counter(v.truth for v in verdicts if v.hit)

    def figures(name: str) -> RouteFigures:
        share: Callable[[int], float] = lambda n: hits[name] / n if n else math.nan  # noqa: E731
        together = truths[name] + choices[name]
        f1 = 2 * hits[name] / together if together else math.nan
        return RouteFigures(share(choices[name]), share(truths[name]), f1, truths[name])

    return {name: figures(name) for name in sorted({*truths, *choices})}


def _confusion(verdicts: Sequence[Verdict]) -> dict[str, dict[str, int]]:
    counts = Counter((v.truth, v.first) for v in verdicts)
    truths = sorted({truth for truth, _ in counts})
    return {t: {c: n for (u, c), n in sorted(counts.items()) if u == t} for t in truths}


def _confused(
    verdicts: Sequence[Verdict], pairs: int = 10, queries: int = 5
) -> tuple[tuple[str, str, tuple[str, ...]], ...]:
    found: dict[tuple[str, str], list[str]] = {}
    for v in verdicts:
        if not v.hit:
            found.setdefault((v.truth, v.first), []).append(v.row.text)
    worst = sorted(found.items(), key=lambda item: (-len(item[1]), item[0]))[:pairs]
    return tuple((truth, choice, tuple(texts[:queries])) for (truth, choice), texts in worst)
