"""How well mixes answer rows, side by side: every row under every mix in one running batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from loramix.chat import Example
from loramix.engine import Answer, Engine, Request, Sampling
from loramix.errors import BadRequest
from loramix.eval.metrics import Metric, agreement
from loramix.mix import Mix

if TYPE_CHECKING:
    from numpy.typing import NDArray

RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over rows; `low` to `high` is the central 95 % of a bootstrap (Efron 1979)."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Quality:
    """How one contestant did on all rows.

    `gain` is its score less that of the first contestant, row by row; `truncated` the share of
    answers that ended at the limit of tokens, which a metric may well call wrong.
    """

    name: str
    score: Interval
    gain: Interval
    truncated: float
    num_tokens: float  # of an answer, mean
    hits: tuple[float, ...]  # the metric of each row
    answers: tuple[str, ...]


def compare(
    engine: Engine,
    examples: Sequence[Example],
    contestants: Mapping[str, Sequence[Mix]],
    metric: Metric,
    *,
    max_tokens: int,
    seed: int = 0,
) -> list[Quality]:
    """Greedy answers of all contestants; each has a mix for every row (a router has several).

    What two contestants ask alike is answered once. Raises BadRequest where there is nothing to
    compare, or the metric leaves 0 to 1.
    """
    if not examples or not contestants:
        raise BadRequest("There is nothing to compare; give rows with answers, and mixes.")
    sampling = Sampling(temperature=0, max_tokens=max_tokens)
    asked = dict.fromkeys((mix, n) for mixes in contestants.values() for n, mix in enumerate(mixes))
    requests = [Request(examples[n].messages[:-1], mix, sampling) for mix, n in asked]
    found = dict(zip(asked, engine.generate(requests), strict=True))
    answers = {
        name: [found[mix, n] for n, mix in enumerate(mixes)] for name, mixes in contestants.items()
    }
    hits = {
        name: np.array([agreement(metric, a.text, e) for a, e in zip(mine, examples, strict=True)])
        for name, mine in answers.items()
    }
    first = next(iter(hits.values()))
    return [_quality(name, answers[name], hits[name], first, seed) for name in contestants]


def _quality(
    name: str,
    answers: Sequence[Answer],
    hits: NDArray[np.float64],
    first: NDArray[np.float64],
    seed: int,
) -> Quality:
    return Quality(
        name,
        score=bootstrap(hits, seed),
        gain=bootstrap(hits - first, seed),
        truncated=float(np.mean([answer.finish == "length" for answer in answers])),
        num_tokens=float(np.mean([answer.num_tokens for answer in answers])),
        hits=tuple(hits.tolist()),
        answers=tuple(answer.text for answer in answers),
    )


def bootstrap(values: NDArray[np.float64], seed: int = 0) -> Interval:
    """The mean of values [M] and its percentile interval; the same rows are drawn for one seed."""
    picks = np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(values[picks].mean(1), [0.025, 0.975]).tolist()
    return Interval(float(values.mean()), low, high)
