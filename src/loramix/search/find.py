"""A search from beginning to end: split the rows, race the starts, run a method, report."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from loramix.errors import SearchError
from loramix.mix import DECIMALS
from loramix.search import Ended, Found, Gain, Measure, Progress
from loramix.search.methods import METHODS
from loramix.search.trials import Overfit, Spent, Split, Trials, split

if TYPE_CHECKING:
    from loramix.search import Losses, Points

RESAMPLES = 10_000
BASE, EQUAL = "base", "equal"


def find(
    measure: Measure,
    keys: Sequence[object],
    *,
    method: str = "gradient",
    budget: float = 100,
    seed: int = 0,
    report: Callable[[Progress], None] = lambda progress: None,
) -> Found:
    """The point with the least loss, and what it gains on rows that no choice was made by.

    `keys` has one item per row of the measure: rows of one key are never apart (their prompts).
    `budget` is in trials (trials.py says what one is). The same seed gives the same result.
    KeyboardInterrupt ends the search, not the report. Raises SearchError for too few rows, a budget
    that does not reach for the starts, an unknown method, or one that the measure cannot serve.
    """
    check(method, budget)
    began, rng = time.perf_counter(), np.random.default_rng(seed)
    rows = split(keys, rng)
    trials = Trials(measure, rows, budget, report)
    starts = starting_points(measure.owners)
    start = _race_starts(trials, starts)
    ended = _run(method, trials, rng)
    found = np.round(trials.chosen, DECIMALS)
    base_loss, start_loss, loss, gain = _held_out(measure, rows, starts[start], found, rng)
    return Found(
        point=tuple(found.tolist()),
        start=start,
        start_point=tuple(starts[start].tolist()),
        base_loss=base_loss,
        start_loss=start_loss,
        loss=loss,
        gain=gain,
        trials=trials.spent,
        ended=ended,
        seconds=time.perf_counter() - began,
        num_rows=(len(rows.fit), len(rows.choose), len(rows.held)),
    )


def check(method: str, budget: float) -> None:
    """SearchError for what no measure could serve."""
    if method not in METHODS:
        raise SearchError(f"Unknown method {method!r}; expected one of {', '.join(METHODS)}.")
    if not 0 < budget < math.inf:
        raise SearchError(f"A budget of {budget:g} trials is none; give a number such as 100.")


def starting_points(owners: Sequence[str]) -> dict[str, Points]:
    """What needs no search, by name: the base, each adapter alone, all of them equally."""
    names = sorted(set(owners))
    alone = {name: np.array([float(owner == name) for owner in owners]) for name in names}
    points = {BASE: np.zeros(len(owners)), **alone}
    return points if len(names) == 1 else {**points, EQUAL: np.full(len(owners), 1 / len(names))}


def _race_starts(trials: Trials, starts: dict[str, Points]) -> str:
    """The name of the best one."""
    needed = trials.race_cost(len(starts))
    if needed > trials.budget:
        raise SearchError(
            f"The budget of {trials.budget:g} trials does not reach for the {len(starts)} starts, "
            f"which take {needed:.1f}; raise it, or name fewer adapters."
        )
    means, whole = trials.race(np.array(list(starts.values())))
    if not trials.is_finite:
        raise SearchError(
            "Neither the base nor an adapter gives all rows a finite loss; check the weights of "
            "the base (loramix ask -m base) and the adapters (loramix adapters check)."
        )
    return list(starts)[min(whole, key=lambda n: means[n])]


def _run(method: str, trials: Trials, rng: np.random.Generator) -> Ended:
    try:
        METHODS[method](trials, rng)
    except Spent:
        return "budget"
    except Overfit:
        return "early"
    except KeyboardInterrupt:
        return "interrupted"
    return "converged"


def _held_out(
    measure: Measure, rows: Split, start: Points, found: Points, rng: np.random.Generator
) -> tuple[float, float, float, Gain]:
    """Mean losses of base, start and found, and the gain of the last over the second."""
    losses = measure.losses(np.stack([np.zeros_like(found), start, found]), rows.held)
    sizes = measure.sizes[list(rows.held)]
    base, before, after = (losses.sum(1) / sizes.sum()).tolist()
    return base, before, after, _gain(losses[1] - losses[2], sizes, rng)


def _gain(gained: Losses, sizes: Losses, rng: np.random.Generator) -> Gain:
    picks = rng.integers(len(gained), size=(RESAMPLES, len(gained)))
    means = gained[picks].sum(1) / sizes[picks].sum(1)
    low, high = np.quantile(means, [0.025, 0.975]).tolist()
    return Gain(float(gained.sum() / sizes.sum()), low, high)
