"""What would make a router better: more examples, fewer overlaps, other labels.

Every example is held out once from a gate fitted on the rest (five folds), and that gate is asked
whose it is. Pairs of adapters it takes for each other overlap; an example that it gives to another
adapter surely may be labelled wrongly.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np

from loramix.route.gate import GateRouter
from loramix.route.learn import Trial
from loramix.route.ngrams import Floats, Ints
from loramix.route.rows import FOLDS, Rows

ENOUGH = 20  # examples of an adapter; with fewer a broad one is right two times in three
SURE = 0.9  # probability of another adapter that makes a label suspicious
OVERLAP = 0.05  # of the smaller adapter's examples


class Overlap(NamedTuple):
    """Two adapters that are taken for each other; `share` is of the smaller one's examples."""

    first: str
    second: str
    share: float


class Suspect(NamedTuple):
    """An example that the gate gives to another adapter when it has not seen it."""

    text: str
    label: str
    instead: str
    probability: float


class Suggestions(NamedTuple):
    short: dict[str, int]  # adapters with few examples, and how many they have
    overlaps: tuple[Overlap, ...]  # worst first
    suspects: tuple[Suspect, ...]  # surest first


def suggest(router: GateRouter) -> Suggestions:
    """Look at a router's own examples; refits its gate five times."""
    rows = router.rows()
    places, probabilities = _held_out(rows)
    labels, names = rows.labels[places], rows.adapters
    counts = dict(zip(names, rows.counts().tolist(), strict=True))
    chosen = probabilities.argmax(axis=1)
    wrong = np.flatnonzero(chosen != labels)
    pairs = Counter(
        (min(a, b), max(a, b))
        for a, b in zip(labels[wrong].tolist(), chosen[wrong].tolist(), strict=True)
    )
    overlaps = [
        Overlap(names[a], names[b], n / min(counts[names[a]], counts[names[b]]))
        for (a, b), n in pairs.items()
    ]
    suspects = [
        Suspect(rows.texts[places[i]], names[labels[i]], names[chosen[i]], float(p))
        for i in wrong.tolist()
        if (p := probabilities[i, chosen[i]]) >= SURE
    ]
    return Suggestions(
        short={name: n for name, n in counts.items() if n < ENOUGH},
        overlaps=tuple(
            sorted((o for o in overlaps if o.share >= OVERLAP), key=lambda o: (-o.share, o))
        ),
        suspects=tuple(sorted(suspects, key=lambda s: (-s.probability, s.text))),
    )


def _held_out(rows: Rows) -> tuple[Ints, Floats]:
    """The adapters' rows that could be held out, and P(adapter | it is one of them) [N, K]."""
    places, found = [], []
    for fold in range(FOLDS):
        held = np.flatnonzero(rows.fold(fold))
        own = rows.labels[held] < rows.none
        if not own.any():
            continue
        trial = Trial.of(rows, fold)
        log_probs = trial.gate.log_probs(trial.held.batch)[own, :-1]
        chances = np.exp(log_probs - np.logaddexp.reduce(log_probs, axis=1)[:, None])
        places.append(held[own])
        found.append(chances)
    if not places:
        return np.zeros(0, np.int64), np.zeros((0, rows.none), np.float32)
    return np.concatenate(places), np.concatenate(found)
