"""How a gate and its abstain score are learned from the rows of the adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from loramix.route.abstain import Abstain, fit_abstain, signs
from loramix.route.blend import Gate, blend, look, place
from loramix.route.neighbours import Neighbours
from loramix.route.ngrams import Floats, Ints, Vocabulary
from loramix.route.rows import FOLDS, Batch, Mask, Rows
from loramix.route.softmax import fit_softmax

CROSS_FIT = 1000  # with fewer rows of adapters, every row is held out once; else one fold is
STORED = {False: 300, True: 2000}  # examples kept as neighbours, without and with sentence vectors
LEFT_OUT = 600  # rows of each adapter in the refits that leave some adapters out
STRENGTH = 20.0  # of the data against the regulariser
FIT_STEPS, REFIT_STEPS = 100, 30
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5)  # of the n-grams in the blend, tried on held-out rows
TEMPERATURES = tuple(float(t) for t in np.geomspace(0.3, 3, 24))


class Calibration(NamedTuple):
    """What held-out rows decide."""

    share: float
    temperature: float
    abstain: Abstain


def fit_gate(rows: Rows, *, share: float = 1.0, temperature: float = 1.0) -> Gate:
    """Fit both halves from nothing."""
    vocabulary = Vocabulary.fit(rows.batch.counts, rare=rows.scarce())
    return _fit_halves(rows, vocabulary, None, share, temperature)


def refit_gate(rows: Rows, start: Gate) -> Gate:
    """Fit a gate with the classes, the vocabulary and the calibration of another, in few steps."""
    return _fit_halves(rows, start.vocabulary, start, start.share, start.temperature)


def _fit_halves(
    rows: Rows, vocabulary: Vocabulary, start: Gate | None, share: float, temperature: float
) -> Gate:
    steps = REFIT_STEPS if start else FIT_STEPS
    ngrams = fit_softmax(
        vocabulary.weigh(rows.batch.counts),
        rows.labels,
        len(vocabulary.columns),
        strength=STRENGTH,
        start=start.ngrams if start else None,
        steps=steps,
    )
    if (vectors := rows.batch.vectors) is None:
        return Gate(vocabulary, ngrams, None, 1.0, temperature)
    dense = fit_softmax(
        vectors,
        rows.labels,
        vectors.shape[1],
        strength=STRENGTH,
        start=start.vectors if start else None,
        steps=steps,
    )
    return Gate(vocabulary, ngrams, dense, share, temperature)


def calibrate(rows: Rows, keep: float) -> Calibration:
    """Choose what the gate leaves open by how a gate without them treats held-out rows."""
    folds = range(FOLDS) if rows.counts().sum() < CROSS_FIT else range(1)
    trials = [Trial.of(rows, fold) for fold in folds]
    share, temperature = _sharpen(trials)
    trials = [trial.calibrated(share, temperature) for trial in trials]
    own = [trial.signs(trial.held.labels < rows.none) for trial in trials]
    far = [trial.signs(trial.held.labels == rows.none) for trial in trials]
    labels = np.concatenate([t.held.labels[t.held.labels < rows.none] for t in trials])
    foreign = np.concatenate([*far, *trials[0].left_out()])
    abstain = fit_abstain(np.concatenate(own), labels, foreign, adapters=rows.none, keep=keep)
    return Calibration(share, temperature, abstain)


@dataclass(frozen=True, slots=True, eq=False)
class Trial:
    """A gate fitted on some rows, and the rows held out from it."""

    gate: Gate
    fitted: Rows
    held: Rows
    neighbours: Neighbours

    @classmethod
    def of(cls, rows: Rows, fold: int) -> Trial:
        mask = rows.fold(fold)
        fitted, held = rows.take(np.flatnonzero(~mask)), rows.take(np.flatnonzero(mask))
        gate = fit_gate(fitted)
        return cls(gate, fitted, held, store(fitted, gate))

    def calibrated(self, share: float, temperature: float) -> Trial:
        gate = replace(self.gate, share=share, temperature=temperature)
        return replace(self, gate=gate)

    def signs(self, mask: Mask) -> Floats:
        return signs_of(self.held.take(np.flatnonzero(mask)).batch, self.gate, self.neighbours)

    def left_out(self) -> list[Floats]:
        """Held-out rows as gates see them that were fitted without their adapters, by group."""
        adapters = np.arange(self.held.none)
        groups = [adapters[g::FOLDS] for g in range(min(FOLDS, len(adapters)))]
        return [self._unaware(group) for group in groups if len(group) < len(adapters)]

    def _unaware(self, group: Ints) -> Floats:
        others = self.fitted.without(group, limit=LEFT_OUT)
        gate = refit_gate(others, self.gate.without(group))
        unseen = self.held.take(np.flatnonzero(np.isin(self.held.labels, group))).batch
        return signs_of(unseen, gate, self.neighbours.without(group))


def _sharpen(trials: Sequence[Trial]) -> tuple[float, float]:
    """The blend and temperature with the best balanced likelihood of the held-out rows."""
    labels = np.concatenate([trial.held.labels for trial in trials])
    halves = [trial.gate.halves(trial.held.batch) for trial in trials]
    sparse = np.concatenate([half[0] for half in halves])
    dense = [half[1] for half in halves if half[1] is not None]
    joined = np.concatenate(dense) if dense else None
    balance = 1 / np.maximum(np.bincount(labels), 1)[labels]

    def loss(share: float, temperature: float) -> float:
        log_probs = blend((sparse, joined), share, temperature)
        return -float((balance * log_probs[np.arange(len(labels)), labels]).sum())

    grid = [(s, t) for s in (SHARES if dense else (1.0,)) for t in TEMPERATURES]
    return min(grid, key=lambda point: loss(*point)) if len(labels) else (grid[0][0], 1.0)


def signs_of(batch: Batch, gate: Gate, neighbours: Neighbours) -> Floats:
    return signs(look(batch, gate, neighbours))


def store(rows: Rows, gate: Gate) -> Neighbours:
    """The first examples of every adapter, in the order of their hashes, as neighbours."""
    limit = STORED[rows.batch.vectors is not None]
    chosen = [np.flatnonzero(rows.labels == label)[:limit] for label in range(rows.none)]
    some = rows.take(np.concatenate(chosen))
    ranks = np.concatenate([np.arange(len(part)) for part in chosen])
    return Neighbours(place(some.batch, gate), some.labels, ranks, some.texts)
