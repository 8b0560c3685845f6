"""Search: rows with answers -> the weights that answer them best, and how much better they are.

A trial is a row of gates, not a merged model: all of them run through one frozen base
(gates.py). What is searched is a point, one weight per adapter or per adapter and layer; a
`Measure` says how badly it does on some rows. Methods (methods.py) know no more than that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Points: TypeAlias = NDArray[np.float64]  # [N, P], or one of them: [P]
    Losses: TypeAlias = NDArray[np.float64]  # [N, M]

Ended = Literal["budget", "converged", "early", "interrupted"]
LOW, HIGH = -1.0, 2.0  # weights that are looked at


class Measure(Protocol):
    """How badly points do on rows: the only thing a method can ask."""

    @property
    def owners(self) -> Sequence[str]:
        """The adapter that each of the P weights belongs to."""

    @property
    def sizes(self) -> NDArray[np.float64]:
        """What each of all rows counts, [M]: its answer's tokens for a loss, else 1."""

    def losses(self, points: Points, rows: Sequence[int]) -> Losses:
        """Of each point [N, P] on each of these rows: less is better. A mean divides by sizes."""


class Smooth(Measure, Protocol):
    """A measure that has gradients."""

    def gradient(self, point: Points, rows: Sequence[int]) -> tuple[Losses, Points]:
        """The losses of one point [P] on each row, and the exact gradient of their sum, [P]."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a search is."""

    spent: float  # of the budget, in trials
    budget: float
    loss: float  # mean of the best point on the search rows
    best: Sequence[float]


@dataclass(frozen=True, slots=True)
class Gain:
    """How much less loss one point has than another on rows that no choice was made by.

    `low` to `high` is the central 95 % of a paired bootstrap over these rows (Efron 1979).
    """

    mean: float
    low: float
    high: float

    @property
    def is_proven(self) -> bool:
        return self.low > 0


@dataclass(frozen=True, slots=True)
class Found:
    """What a search found; losses are means over the held-out rows."""

    point: tuple[float, ...]
    start: str  # the best of what needs no search: "base", an adapter, or "equal"
    start_point: tuple[float, ...]
    base_loss: float
    start_loss: float
    loss: float
    gain: Gain  # over the start
    trials: float  # spent
    ended: Ended
    seconds: float
    num_rows: tuple[int, int, int]  # searched with, chosen by, held out
