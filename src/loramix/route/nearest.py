"""The router that only compares: the stored examples nearest to a query vote for their adapters.

It has no weights of its own: it reads the examples of a fitted router where they are stored. A vote
counts by its cosine; how far a query may be from all examples is a threshold that the examples set
themselves, each compared with the others (split conformal, as in abstain.py), against the packaged
queries that belong to nobody.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from loramix.chat import Message
from loramix.errors import RouteError
from loramix.mix import Mix
from loramix.route import Decision, to_mix
from loramix.route.abstain import Abstain, fit_abstain
from loramix.route.blend import place
from loramix.route.gate import MIX_TEMPERATURE, GateRouter
from loramix.route.neighbours import best
from loramix.route.ngrams import Floats, Ints, words
from loramix.route.reasons import least_of, nearest, quoted, verdict
from loramix.route.rows import Batch, read
from loramix.route.turns import follow, user_turns

VOTES = 5
SHARPNESS = 10.0  # a vote weighs exp(SHARPNESS * cosine)
TRIED = 1500  # stored examples, and foreign queries, about, that set the threshold


@dataclass(frozen=True, eq=False)
class NearestRouter:
    """The VOTES nearest examples of a fitted router decide; its gate is not asked.

    Turns follow each other as the gate's do (turns.py).
    """

    stored: GateRouter
    abstain: Abstain  # its signs: the nearest cosine, and the mean of the nearest five

    @classmethod
    def of(cls, stored: GateRouter) -> NearestRouter:
        """Set the threshold so that a share `stored.keep` of its examples stay. RouteError."""
        near, adapters = stored.neighbours, len(stored.adapters)
        several = np.bincount(near.labels, minlength=adapters) > 1
        tried = np.flatnonzero((near.ranks < max(1, TRIED // adapters)) & several[near.labels])
        if not len(tried):
            raise RouteError("Examples set the threshold; give some adapter two examples at least.")
        cosines = near.similarities(near.take(tried))
        cosines[np.arange(len(tried)), tried] = 0  # an example is no neighbour of itself
        abstain = fit_abstain(
            _signs(cosines),
            near.labels[tried],
            _signs(near.similarities(place(_foreign(stored), stored.gate))),
            adapters=adapters,
            keep=stored.keep,
        )
        return cls(stored, abstain)

    @property
    def adapters(self) -> tuple[str, ...]:
        return self.stored.adapters

    def scores(self, queries: Sequence[str]) -> list[list[float]]:
        """Each adapter's share of the votes, times the probability that any adapter fits."""
        if not len(queries):
            return []
        cosines = self._cosines(queries)
        shares = np.exp(_votes(cosines, self.stored.neighbours.labels, len(self.adapters)))
        found: list[list[float]] = (shares * (1 - self._none(cosines))[:, None]).tolist()
        return found

    def route(self, messages: Sequence[Message]) -> Decision:
        """The mix of the last user turn; the empty one if no example is near. Raises RouteError."""
        started = time.perf_counter()
        decision = follow(self.decide, self.stored.information, user_turns(messages))
        return replace(decision, latency_ms=(time.perf_counter() - started) * 1e3)

    def decide(self, query: str) -> Decision:
        """The decision on one text, whatever came before it."""
        if not words(query):
            scores = dict.fromkeys(self.adapters, 0.0)
            return Decision(Mix(), scores, 1.0, ("base: the query has no words to route on",), 0.0)
        cosines = self._cosines([query])
        votes = _votes(cosines, self.stored.neighbours.labels, len(self.adapters))[0]
        winner, none = int(votes.argmax()), float(self._none(cosines)[0])
        score, least = float(self._scores(cosines)[0]), self.abstain.thresholds[winner]
        fits = score >= least
        name = self.adapters[winner]
        near = nearest(self.stored.neighbours, self.adapters, cosines[0])
        shares = (np.exp(votes) * (1 - none)).tolist()
        return Decision(
            mix=self._mix(votes) if fits else Mix(),
            scores=dict(zip(self.adapters, shares, strict=True)),
            none=none,
            reasons=(
                verdict(name, score, least, least_of(name, self.stored.keep)),
                *(f"near {n.cosine:.2f} {n.adapter}: {quoted(n.text)}" for n in near),
            ),
            latency_ms=0.0,
            nearest=near,
            coldness=self.stored.coldness(self.adapters[winner]),
        )

    def _mix(self, votes: Floats) -> Mix:
        top = self.stored.top
        return to_mix(votes.tolist(), self.adapters, top=top, temperature=MIX_TEMPERATURE)

    def _cosines(self, queries: Sequence[str]) -> Floats:
        """With every stored example, [N, E]."""
        batch = read(queries, self.stored.ngrams, self.stored.encoder)
        return self.stored.neighbours.similarities(place(batch, self.stored.gate))

    def _scores(self, cosines: Floats) -> Floats:
        return self.abstain.of_signs(_signs(cosines))

    def _none(self, cosines: Floats) -> Floats:
        """Probability that no adapter fits, [N]."""
        none: Floats = 1 / (1 + np.exp(self._scores(cosines).clip(-30, 30)))
        return none


def _signs(cosines: Floats) -> Floats:
    near = best(cosines, VOTES)
    return np.stack([near[:, 0], near.mean(axis=1)], axis=1)


def _votes(cosines: Floats, labels: Ints, adapters: int) -> Floats:
    """Logarithm of each adapter's share of the votes, [N, K]; nobody's is a thousandth."""
    found = np.full((len(cosines), adapters), 1e-3, np.float32)
    count = min(VOTES, len(labels))
    for row, near in zip(found, cosines, strict=True):
        voters = np.argpartition(-near, count - 1)[:count]
        np.add.at(row, labels[voters], np.exp(SHARPNESS * (near[voters] - near[voters].max())))
    shares: Floats = np.log(found / found.sum(axis=1, keepdims=True))
    return shares


def _foreign(stored: GateRouter) -> Batch:
    """The first of the queries of nobody that it was fitted with; their vectors are stored last."""
    texts = stored.examples[""]
    vectors = None if stored.vectors is None else stored.vectors[-len(texts) :][:TRIED]
    return Batch(stored.ngrams.matrix(texts[:TRIED]), vectors)
