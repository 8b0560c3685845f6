"""Trials against a budget: what was looked at, what was best, and when to stop.

The rows are split three ways before anything is measured: `fit` to search with, `choose` to choose
among what was best on those (so that a few rows are not learned by heart), `held` for the report.

The budget is in trials: one trial is one point on as many rows as there are in `fit`. It is counted
row by row: half the rows cost half a trial, a row with its gradient costs two rows, and looks at
`choose` count as well. What the final report measures does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np

from loramix.errors import SearchError
from loramix.search import Progress

if TYPE_CHECKING:
    from loramix.search import Losses, Measure, Points, Smooth

LEAST_ROWS = 10
HELD_OUT, CHOOSE = 0.3, 0.2  # shares of all rows
FIRST_RUNG = 8  # rows at least, to drop a point by
PATIENCE = 8  # best points in a row that are no better on `choose`
ENDLESS = 1e9  # nats of a row under which the model breaks
GRADIENT_COST = 2.0  # rows; measured in docs/search.md


class Spent(Exception):
    """The budget is used up."""


class Overfit(Exception):
    """What gets better on `fit` has long stopped to get better on `choose`."""


@dataclass(frozen=True, slots=True)
class Split:
    """Numbers of rows; every row is in one of the three."""

    fit: tuple[int, ...]
    choose: tuple[int, ...]
    held: tuple[int, ...]


def split(keys: Sequence[object], rng: np.random.Generator) -> Split:
    """Rows at random, those of one key (their prompt) together; SearchError if they are too few."""
    groups: dict[object, list[int]] = {}
    for row, key in enumerate(keys):
        groups.setdefault(key, []).append(row)
    if len(groups) < LEAST_ROWS:
        raise SearchError(
            f"{len(groups)} different prompts are too few to search with and to hold some out; "
            f"give at least {LEAST_ROWS}."
        )
    order = list(groups.values())
    rng.shuffle(order)
    held, choose = (max(1, round(share * len(order))) for share in (HELD_OUT, CHOOSE))
    parts = order[held + choose :], order[held : held + choose], order[:held]
    return Split(*(tuple(row for group in part for row in group) for part in parts))


class Trials:
    """Runs trials and remembers the best: by the rows of `fit`, and by those of `choose`."""

    def __init__(
        self,
        measure: Measure,
        rows: Split,
        budget: float,
        report: Callable[[Progress], None] = lambda progress: None,
    ) -> None:
        self.measure = measure
        self.rows = rows
        self.budget = budget
        self.best = np.zeros(len(measure.owners))
        self.best_loss = np.inf
        self.chosen = self.best  # by `choose`, among those that were once the best
        self.history: list[tuple[Points, float]] = []  # all points seen on all of `fit`
        self._chosen_loss = np.inf
        self._num_worse = 0
        self._spent = 0.0  # rows
        self._report = report

    @property
    def num_weights(self) -> int:
        return len(self.measure.owners)

    @property
    def spent(self) -> float:
        """In trials."""
        return self._spent / len(self.rows.fit)

    @property
    def is_finite(self) -> bool:
        """Whether the best point has a finite loss on every row of `fit`."""
        return self.best_loss * self._size(self.rows.fit) < ENDLESS

    @property
    def rungs(self) -> list[int]:
        """Numbers of rows of `fit`, each twice the one before, the last all of them."""
        sizes = [len(self.rows.fit)]
        while sizes[0] >= 2 * FIRST_RUNG:
            sizes.insert(0, sizes[0] // 2)
        return sizes

    def losses(self, points: Points) -> Losses:
        """Mean loss of each point [N, P] on all of `fit`, [N]; Spent if that was the last."""
        return self._noted(points, self._look(points, self.rows.fit).sum(1))

    def race(self, points: Points) -> tuple[Losses, Sequence[int]]:
        """Successive halving over rows (https://arxiv.org/abs/1502.07943).

        All points run on a few rows, the better half on twice as many, and so on. Gives the mean
        loss of each on the rows it has seen, [N], and the numbers of those that have seen all.
        """
        sums, means = np.zeros(len(points)), np.full(len(points), np.inf)
        alive, seen = np.arange(len(points)), 0
        rungs = self.rungs[-max(1, len(points).bit_length()) :]
        for upto in rungs:
            rows = self.rows.fit[seen:upto]
            sums[alive] += self._look(points[alive], rows).sum(1)
            means[alive], seen = sums[alive] / self._size(self.rows.fit[:upto]), upto
            if upto < rungs[-1]:
                keep = (len(alive) + 1) // 2
                alive = np.sort(alive[np.argsort(means[alive], kind="stable")[:keep]])
        self._noted(points[alive], sums[alive])
        return means, alive.tolist()

    def race_cost(self, num_points: int) -> float:
        """Of a race, in trials."""
        rungs = self.rungs[-max(1, num_points.bit_length()) :]
        cost, seen = 0, 0
        for upto in rungs:
            cost, seen, num_points = cost + num_points * (upto - seen), upto, (num_points + 1) // 2
        return cost / len(self.rows.fit)

    def slope(self, point: Points, num_rows: int) -> tuple[float, Points]:
        """Mean loss of one point on the first rows of `fit`, and its gradient [P]."""
        rows = self.rows.fit[:num_rows]
        self._spend(GRADIENT_COST * len(rows))
        losses, gradient = cast("Smooth", self.measure).gradient(point, rows)
        losses, gradient = _finite(losses), np.nan_to_num(gradient, posinf=0, neginf=0)
        if num_rows == len(self.rows.fit):
            self._noted(point[None].copy(), losses.sum(keepdims=True))
        return losses.sum() / self._size(rows), gradient / self._size(rows)

    def _noted(self, points: Points, sums: Losses) -> Losses:
        means = sums / self._size(self.rows.fit)
        self.history += zip(points, means.tolist(), strict=True)
        first = int(means.argmin())
        if means[first] < self.best_loss:
            self.best, self.best_loss = points[first].copy(), float(means[first])
            self._consider(self.best)
        self._tell()
        return means

    def _consider(self, point: Points) -> None:
        """Whether the new best point is also better on rows that it was not found by."""
        self._spent += len(self.rows.choose)  # never refused: a best point is always judged
        losses = _finite(self.measure.losses(point[None], self.rows.choose))
        loss = losses.sum() / self._size(self.rows.choose)
        if loss < self._chosen_loss:
            self.chosen, self._chosen_loss, self._num_worse = point, float(loss), 0
            return
        self._num_worse += 1
        if self._num_worse >= PATIENCE:
            raise Overfit

    def _look(self, points: Points, rows: Sequence[int]) -> Losses:
        self._spend(len(points) * len(rows))
        return _finite(self.measure.losses(points, rows))

    def _spend(self, rows: float) -> None:
        """Spent if the budget does not reach for these rows."""
        if self._spent + rows > self.budget * len(self.rows.fit):
            raise Spent
        self._spent += rows

    def _size(self, rows: Sequence[int]) -> float:
        return float(self.measure.sizes[list(rows)].sum())

    def _tell(self) -> None:
        self._report(Progress(self.spent, self.budget, self.best_loss, self.best.tolist()))


def _finite(losses: Losses) -> Losses:
    """Weights that break the model lose to all others, and sums stay numbers."""
    return np.where(np.isfinite(losses), losses, ENDLESS)
