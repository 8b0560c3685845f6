"""An adapter joins a fitted router at once: it gets a column in every model, and no other changes.

The other classes' weights stand, so what is left to find is convex and as small as a row is wide.
Whatever share of a query the newcomer takes, it takes from all others alike: among themselves they
rank as before. It is told from a sample of their stored rows; the kernel, which is in closed form,
is solved again. A refit learns all classes together, later.

Its threshold is conformal, like the others', if it has the queries for that: each half of them is
scored by what the other half taught. An adapter with fewer, or with its card alone, answers where
it is the likeliest and no more than one in a hundred foreign queries comes as far.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from loramix.adapter import Card
from loramix.errors import RouteError
from loramix.mix import check_name
from loramix.route.abstain import conformal, enough
from loramix.route.blend import Gate, look, place
from loramix.route.kernel import Kernel, fit_kernel
from loramix.route.learn import FEW_FOREIGN, STORED, STRENGTH
from loramix.route.ngrams import Floats, Sparse
from loramix.route.rows import Batch, Rows, clean, read
from loramix.route.softmax import Softmax, fit_column

if TYPE_CHECKING:
    from loramix.route.gate import GateRouter

TOLD_FROM = 2000  # rows of the other adapters, about
STEPS = 20
FALSE = 0.01  # of foreign queries that may reach an adapter without queries to judge it by
LOWEST = -20.0  # log-odds


def card_texts(card: Card) -> list[str]:
    """What a card says an adapter is for, as queries: its name in words, and all that is on it."""
    spoken = card.name.replace("-", " ").replace("_", " ")
    return [spoken, *filter(None, [card.description]), *card.skills, *card.examples]


def joined(router: GateRouter, name: str, texts: Sequence[str]) -> GateRouter:
    """The router with one more adapter; the only texts that are embedded are its own.

    Raises RouteError if none of them has a word in it.
    """
    own = tuple(clean(texts))
    if check_name(name) and not own:
        raise RouteError(f"No example of {name!r} has a word in it; give one query at least.")
    batch, others = read(own, router.ngrams, router.encoder), _sample(router)
    grown = _put(router, name, own, batch, others)
    scores = _unseen_scores(router, name, own, batch, others)
    if enough(scores, router.keep):
        threshold = conformal(scores, router.keep)
    else:
        threshold = _above_foreign(grown, name, others)
    at, thresholds = grown.adapters.index(name), [*router.abstain.thresholds]
    thresholds.insert(at, threshold)
    return replace(grown, abstain=replace(router.abstain, thresholds=tuple(thresholds)))


def parted(router: GateRouter, name: str) -> GateRouter:
    """The router without one of its adapters; the others keep their weights and thresholds."""
    at = router.adapters.index(name)
    struck, thresholds = np.array([at]), router.abstain.thresholds
    examples = {key: texts for key, texts in router.examples.items() if key != name}
    vectors, gate = router.vectors, router.gate.without(struck)
    if vectors is not None:
        first = _first(router.examples, name)
        vectors = np.delete(vectors, slice(first, first + len(router.examples[name])), axis=0)
        gate = replace(gate, kernel=gate.kernel and _kernel(vectors, examples))
    return replace(
        router,
        adapters=(*router.adapters[:at], *router.adapters[at + 1 :]),
        examples=examples,
        vectors=vectors,
        gate=gate,
        neighbours=router.neighbours.without(struck),
        abstain=replace(router.abstain, thresholds=(*thresholds[:at], *thresholds[at + 1 :])),
        cards=router.cards - {name},
        fresh=router.fresh - {name},
    )


def _put(
    router: GateRouter, name: str, own: tuple[str, ...], batch: Batch, others: Rows
) -> GateRouter:
    """All of it but the threshold."""
    at = bisect_left(router.adapters, name)
    adapters = (*router.adapters[:at], name, *router.adapters[at:])
    examples = {key: own if key == name else router.examples[key] for key in (*adapters, "")}
    total = sum(map(len, examples.values()))
    vectors, gate = router.vectors, _grown(router.gate, batch, others, at, total)
    if vectors is not None and batch.vectors is not None:
        first = _first(examples, name)
        vectors = np.insert(vectors, [first] * len(own), batch.vectors, axis=0)
        gate = replace(gate, kernel=gate.kernel and _kernel(vectors, examples))
    limit = STORED[vectors is not None]
    near = router.neighbours.over(router.gate.vocabulary, gate.vocabulary)
    mine = place(batch.take(np.arange(min(len(own), limit))), gate)
    return replace(
        router,
        adapters=adapters,
        examples=examples,
        vectors=vectors,
        gate=gate,
        neighbours=near.with_class(at, mine, own[:limit]),
    )


def _grown(gate: Gate, own: Batch, others: Rows, at: int, total: int) -> Gate:
    """The gate with one more class, learned against a sample of the `total` rows of all."""
    gate = gate.over(gate.vocabulary.wider(own.counts))
    labels = np.r_[others.labels + (others.labels >= at), np.full(own.counts.num_rows, at)]
    strength = STRENGTH * total / len(labels)
    weighed = gate.vocabulary.weigh(others.batch.counts.followed_by(own.counts))

    def grown(model: Softmax, rows: Floats | Sparse) -> Softmax:
        start = model.with_blank(at)
        return fit_column(rows, labels, start, at, strength=strength, steps=STEPS)

    ngrams = grown(gate.ngrams, weighed)
    if gate.vectors is None or others.batch.vectors is None or own.vectors is None:
        return replace(gate, ngrams=ngrams)
    vectors = grown(gate.vectors, np.concatenate([others.batch.vectors, own.vectors]))
    return replace(gate, ngrams=ngrams, vectors=vectors)


def _unseen_scores(
    router: GateRouter, name: str, own: tuple[str, ...], batch: Batch, others: Rows
) -> Floats:
    """In-scope scores of each half of the newcomer's texts by what the other half taught."""
    found = [np.zeros(0, np.float32)]
    for half in (0, 1) if enough(np.zeros(len(own), np.float32), router.keep) else ():
        known, rest = np.arange(half, len(own), 2), np.arange(1 - half, len(own), 2)
        grown = _put(router, name, own[half::2], batch.take(known), others)
        evidence = look(batch.take(rest), grown.gate, grown.neighbours)
        found.append(router.abstain.scores(evidence))
    return np.concatenate(found)


def _above_foreign(grown: GateRouter, name: str, others: Rows) -> float:
    """The in-scope score that one in a hundred foreign queries reaches with this adapter."""
    foreign = others.batch.take(np.flatnonzero(others.labels == others.none))
    evidence = look(foreign, grown.gate, grown.neighbours)
    winner = evidence.log_probs[:, :-1].argmax(axis=1)
    won = grown.abstain.scores(evidence)[winner == grown.adapters.index(name)]
    allowed = int(FALSE * len(winner))
    if len(won) <= allowed:
        return LOWEST
    return float(np.nextafter(np.sort(won)[::-1][allowed], np.float32(np.inf)))


def _sample(router: GateRouter) -> Rows:
    """Some rows of every class."""
    limit = -(-TOLD_FROM // len(router.adapters))
    texts: list[str] = []
    labels: list[int] = []
    places: list[int] = []
    for label, name in enumerate((*router.adapters, "")):
        some = router.examples[name][: limit if name else FEW_FOREIGN]
        first = _first(router.examples, name)
        texts += some
        labels += [label] * len(some)
        places += range(first, first + len(some))
    vectors = None if router.vectors is None else router.vectors[places]
    batch = Batch(router.ngrams.matrix(texts), vectors)
    return Rows(router.adapters, tuple(texts), np.array(labels), batch)


def _first(examples: Mapping[str, Sequence[str]], name: str) -> int:
    """Where the examples of a class begin among all; the background's come last."""
    return sum(len(texts) for key, texts in examples.items() if key and (key < name or not name))


def _kernel(vectors: Floats, examples: Mapping[str, Sequence[str]]) -> Kernel:
    counts = [len(texts) for name, texts in examples.items() if name]
    labels = np.repeat(np.arange(len(counts)), counts)
    return fit_kernel(vectors[: len(labels)], labels, len(counts))
