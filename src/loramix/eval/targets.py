"""Who really answers a row best: the likelihood of its answer under every adapter and the base.

A label says which data a row came from, not which adapter answers it best, nor whether the base
would have done. Held-out rows with answers say both. Every row under every mix is a row of one
running batch; nothing is merged or loaded between them. A row's target is the posterior over who
wrote its answer, softmax(log-likelihood), every adapter and the base as likely before: soft where
several answer alike, none where the base is best. The rows must be new to the adapters, or these
have learned the answers by heart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from loramix.chat import Example, Message
from loramix.engine import Engine, Request
from loramix.eval.quality import Interval, bootstrap
from loramix.mix import Mix
from loramix.route import Router

if TYPE_CHECKING:
    from numpy.typing import NDArray

AT_ONCE = 32  # rows, each under all mixes
FLOOR = 0.25  # least share of a target that makes a row one of an adapter's, as in `to_mix`

Told = Callable[[Sequence[Message], Mix], Sequence[Message]]  # a prompt, as a mix is asked it


@dataclass(frozen=True, slots=True, eq=False)
class Targets:
    """What the answers of some rows cost under each adapter, and under the base."""

    adapters: tuple[str, ...]
    nats: NDArray[np.float64]  # [N, K + 1], the base last

    @property
    def shares(self) -> NDArray[np.float64]:
        """Soft targets, [N, K + 1]: every row sums to one, the last column is none's."""
        likely = np.exp(self.nats.min(axis=1, keepdims=True) - self.nats)
        shares: NDArray[np.float64] = likely / likely.sum(axis=1, keepdims=True)
        return shares

    @property
    def best(self) -> list[str]:
        """The adapter that answers each row best; "" is the base."""
        return [(*self.adapters, "")[i] for i in self.nats.argmin(axis=1)]

    def take(self, rows: slice) -> Targets:
        return Targets(self.adapters, self.nats[rows])


class Ruler:
    """Measures the answers of rows under mixes with an engine; what was measured is remembered."""

    def __init__(self, engine: Engine, examples: Sequence[Example], told: Told) -> None:
        self._engine = engine
        self._examples = examples
        self._told = told
        self._known: dict[tuple[int, Mix], float] = {}

    def targets(self, adapters: Sequence[str], report: Callable[[int], object]) -> Targets:
        """Every row under every adapter and the base; `report` hears how many rows are done."""
        mixes = [*(Mix({name: 1}) for name in adapters), Mix()]
        found = []
        for start in range(0, len(self._examples), AT_ONCE):
            rows = range(start, min(start + AT_ONCE, len(self._examples)))
            nats = self.nats([(row, mix) for row in rows for mix in mixes])
            found.append(nats.reshape(len(rows), len(mixes)))
            report(rows.stop)
        return Targets(tuple(adapters), np.concatenate(found))

    def nats(self, asked: Sequence[tuple[int, Mix]]) -> NDArray[np.float64]:
        """Minus the log-likelihood of the answers of rows under mixes, as one batch."""
        new = [pair for pair in dict.fromkeys(asked) if pair not in self._known]
        requests = [
            Request(tuple(self._told(self._examples[row].messages[:-1], mix)), mix)
            for row, mix in new
        ]
        answers = [self._examples[row].answer for row, _ in new]
        scores = self._engine.score(requests, answers)
        self._known |= {pair: -score for pair, score in zip(new, scores, strict=True)}
        return np.array([self._known[pair] for pair in asked])

    def routed(self, router: Router, rows: Sequence[int]) -> NDArray[np.float64]:
        """Nats of the answers of some rows under the mixes that a router gives them."""
        mixes = [router.route(self._examples[row].messages[:-1]).mix for row in rows]
        return self.nats(list(zip(rows, mixes, strict=True)))


def oracle_gap(nats: NDArray[np.float64], targets: Targets) -> Interval:
    """Nats an answer costs more than under the best single adapter or the base, with 95 %."""
    return bootstrap(nats - targets.nats.min(axis=1))


def taught(
    examples: Mapping[str, Sequence[str]], texts: Sequence[str], targets: Targets
) -> dict[str, list[str]]:
    """Examples with each measured text under everyone who has a FLOOR of its target, "" for none.

    A text that two adapters answer alike becomes an example of both, which a gate learns as half
    of each. Wherever else it was, it is taken out.
    """
    measured = set(texts)
    found = {name: [t for t in group if t not in measured] for name, group in examples.items()}
    names = (*targets.adapters, "")
    for text, shares in zip(texts, targets.shares, strict=True):
        for name, share in zip(names, shares, strict=True):
            if share >= FLOOR:
                found.setdefault(name, []).append(text)
    return found
