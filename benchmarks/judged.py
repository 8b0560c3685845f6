"""How well loramix's router and semantic-router choose, judged by the same rows and vectors.

semantic-router is the library itself in its default setting: the mean of the five nearest. Where
none is an answer, its confidence is fitted on held-out rows, and must be 0.5.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from queries import Pairs, texts
from semantic_router import IndexedRouter, Route
from semantic_router.encoders import DenseEncoder
from semantic_router.index.local import LocalIndex
from semantic_router.linear import top_scores

from loramix.chat import Message
from loramix.mix import Mix
from loramix.route import Router
from loramix.route.encode import Encoder
from loramix.route.gate import GateRouter
from loramix.route.ngrams import Floats
from loramix.route.report import auroc

PEER = "semantic-router 1.1.1"
BINS = 15
TURN = 30  # texts
ENOUGH = 0.5  # least confidence of semantic-router where none is an answer


class Lookup(DenseEncoder):
    """semantic-router's view of the same vectors."""

    name: str = "memo"
    memo: Any

    def __call__(self, docs: list[str]) -> list[list[float]]:
        return self.memo.encode(docs).tolist()


class UnitIndex(LocalIndex):
    """Their index for vectors of unit length, in the encoder's precision, without taking all norms
    anew at every query.

    The scores are the same but for rounding. Where time is measured they have their own.
    """

    def _upsert(self, *given: Any, **more: Any) -> list[int]:
        places = super()._upsert(*given, **more)
        self.index = np.asarray(self.index, np.float32)
        return places

    def query(self, vector: Floats, top_k: int = 5, *_: object, **__: object) -> Any:
        scores, places = top_scores(self.index @ np.asarray(vector, np.float32), top_k)
        return scores, [self.routes[place] for place in places]

    async def aquery(self, vector: Floats, top_k: int = 5, *_: object, **__: object) -> Any:
        return self.query(vector, top_k)


def peer(
    examples: Mapping[str, Sequence[str]], encoder: Encoder, index: LocalIndex | None = None
) -> IndexedRouter:
    routes = [Route(name=name, utterances=list(texts)) for name, texts in examples.items()]
    return IndexedRouter(
        encoder=Lookup(memo=encoder), routes=routes, index=UnitIndex() if index is None else index
    )


def percent(right: Any) -> float:
    return 100 * float(np.mean(right))


def hits(router: Router, rows: Pairs) -> float:
    """Percent of rows whose best route is their own, when one must be chosen."""
    return percent([name == route for name, (_, route) in zip(firsts(router, rows), rows)])


def firsts(router: Router, rows: Pairs) -> list[str]:
    """The best route of each row, when one must be chosen."""
    best = np.array(router.scores(texts(rows))).argmax(1)
    return [router.adapters[i] for i in best]


def their_hits(router: IndexedRouter, rows: Sequence[tuple[str, str | None]]) -> float:
    return 100 * float(router.evaluate(*zip(*rows, strict=True)))


def their_firsts(router: IndexedRouter, rows: Pairs) -> list[str]:
    return [router(text, threshold=0.0).name for text in texts(rows)]


def choice(router: GateRouter, inside: Pairs, outside: Pairs) -> tuple[float, float, float]:
    """In-scope accuracy, recall of foreign queries, area under the curve."""
    ours, foreign = (
        [router.route([Message("user", text)]) for text in texts(rows)]
        for rows in (inside, outside)
    )
    right = [route in d.mix.top(1) for d, (_, route) in zip(ours, inside, strict=True)]
    area = auroc([d.none for d in foreign], [d.none for d in ours])
    return percent(right), percent([not d.mix for d in foreign]), 100 * area


def their_choice(
    router: IndexedRouter, held: Pairs, foreign: Pairs, inside: Pairs, outside: Pairs
) -> tuple[float, float, float]:
    """The same of semantic-router."""
    calibrate(router, held, foreign)
    ours, others = (
        [router(text, threshold=0.0) for text in texts(rows)] for rows in (inside, outside)
    )
    right = [
        made.name == route and made.confidence >= ENOUGH
        for made, (_, route) in zip(ours, inside, strict=True)
    ]
    area = auroc([made.confidence for made in ours], [made.confidence for made in others])
    return percent(right), percent([made.confidence < ENOUGH for made in others]), 100 * area


def calibrate(router: IndexedRouter, held: Pairs, foreign: Pairs) -> None:
    labels: list[str | None] = [route for _, route in held] + [None] * len(foreign)
    router.fit(texts(held) + texts(foreign), labels)
    router.confidence_threshold = ENOUGH


def error_of_confidence(router: GateRouter, rows: Pairs) -> float:
    """Expected calibration error of the best route's probability among the routes, in percent."""
    scores = np.array(router.scores(texts(rows)))
    scores /= scores.sum(1, keepdims=True)
    return calibration_error(firsts(router, rows), scores.max(1), rows)


def their_error(examples: Mapping[str, Sequence[str]], encoder: Encoder, rows: Pairs) -> float:
    """The same of semantic-router, its confidence fitted on a fifth of the examples, held out."""
    kept = {name: [t for i, t in enumerate(group) if i % 5] for name, group in examples.items()}
    router = peer(kept, encoder)
    calibrate(router, [(t, name) for name, group in examples.items() for t in group[::5]], [])
    made = [router(text, threshold=0.0) for text in texts(rows)]
    return calibration_error([m.name for m in made], np.array([m.confidence for m in made]), rows)


def calibration_error(names: Sequence[str], sure: Floats, rows: Pairs) -> float:
    right = np.array([name == route for name, (_, route) in zip(names, rows, strict=True)])
    place = np.minimum((sure * BINS).astype(int), BINS - 1)
    parts = [place == each for each in range(BINS)]
    gaps = [abs(right[p].mean() - sure[p].mean()) * p.mean() for p in parts if p.any()]
    return 100 * float(sum(gaps))


def routed(router: Router, text: str) -> Mix:
    return router.route([Message("user", text)]).mix


def their_routes(router: IndexedRouter, text: str) -> set[str]:
    """The two best that its confidence lets through."""
    return {made.name for made in router(text, limit=2)}


def in_turns(asked: Sequence[str], *ways: Callable[[str], object]) -> list[tuple[float, float]]:
    """p50 and p95 in milliseconds of each way of routing texts, on one thread.

    They take turns of TURN texts: where each text goes one way and then the other, all that a way
    reads was pushed out of the caches by the other just before.
    """
    from threadpoolctl import threadpool_limits

    spans = np.zeros((len(ways), len(asked)))
    with threadpool_limits(1):
        for first in range(0, len(asked), TURN):
            for m, way in enumerate(ways):
                for n, text in enumerate(asked[first : first + TURN], first):
                    start = time.perf_counter()
                    way(text)
                    spans[m, n] = 1e3 * (time.perf_counter() - start)
    return [(float(p50), float(p95)) for p50, p95 in np.quantile(spans, [0.5, 0.95], axis=1).T]
