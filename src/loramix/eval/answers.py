"""What an engine answers under many mixes, measured: every row under every mix in one batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from loramix.chat import Example
from loramix.engine import Engine, Request, Sampling
from loramix.eval.metrics import Metric, agreement
from loramix.mix import Mix

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loramix.base import Base


class AnswerLoss:
    """One minus a metric of greedy answers: a `Measure` for searches.

    A point has one weight per adapter of `owners`; the engine rounds it as any mix. Answers end at
    `max_tokens`. An answer under a mix that was asked for already is not written again.
    """

    def __init__(
        self,
        engine: Engine,
        owners: Sequence[str],
        examples: Sequence[Example],
        metric: Metric,
        *,
        max_tokens: int,
    ) -> None:
        self.owners = tuple(owners)
        self._engine = engine
        self._examples = examples
        self._metric = metric
        self._sampling = Sampling(temperature=0, max_tokens=max_tokens)
        self._known: dict[tuple[Mix, int], float] = {}

    @property
    def sizes(self) -> NDArray[np.float64]:
        return np.ones(len(self._examples))

    def losses(self, points: NDArray[np.float64], rows: Sequence[int]) -> NDArray[np.float64]:
        """As a `Measure` gives them. Raises BadRequest for a metric outside of 0 to 1."""
        mixes = [Mix(dict(zip(self.owners, point, strict=True))) for point in points.tolist()]
        pairs = dict.fromkeys((mix, row) for row in rows for mix in mixes)
        missing = [pair for pair in pairs if pair not in self._known]
        requests = [
            Request(self._examples[row].messages[:-1], mix, self._sampling) for mix, row in missing
        ]
        for pair, answer in zip(missing, self._engine.generate(requests), strict=True):
            self._known[pair] = 1 - agreement(self._metric, answer.text, self._examples[pair[1]])
        return np.array([[self._known[mix, row] for row in rows] for mix in mixes])


def room_for(base: Base, examples: Sequence[Example]) -> int:
    """Tokens that an answer may take: twice the longest reference, and some."""
    longest = max(len(base.tokenizer(example.answer)["input_ids"]) for example in examples)
    return 2 * longest + 8
