"""How a gate and its abstain score are learned from the rows of the adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np

from loramix.route.abstain import Abstain, fit_abstain, signs
from loramix.route.blend import Blend, Gate, Voices, look, place
from loramix.route.kernel import MOST_ROWS, Kernel, fit_kernel
from loramix.route.neighbours import Neighbours
from loramix.route.ngrams import Floats, Ints, Vocabulary
from loramix.route.rows import FOLDS, Batch, Mask, Rows
from loramix.route.softmax import Softmax, fit_softmax

CROSS_FIT = 1000  # with fewer rows of adapters, every row is held out once; else one fold is
STORED = {False: 300, True: 2000}  # examples kept as neighbours, without and with sentence vectors
LEFT_OUT = 6000  # rows of adapters, about, in the refits that leave some adapters out
FEW_FOREIGN = 1000  # background rows that a trial learns from at least
STRENGTH = 20.0  # of the data against the regulariser
FIT_STEPS, REFIT_STEPS, UNAWARE_STEPS = 40, 40, 10
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5)  # of the n-grams in the blend, tried on held-out rows
KERNELS = (0.5, 1.0)  # of the kernel in the rest
ERROR = 2.0  # nats that a wrong first choice costs beyond its likelihood
USUAL = 0.9  # of own rows have at most the usual share of unknown n-grams
TEMPERATURES = tuple(float(t) for t in np.geomspace(0.3, 3, 24))


class Calibration(NamedTuple):
    """What held-out rows decide."""

    gate: Gate  # fitted on some of the rows, calibrated
    abstain: Abstain


def fit_gate(rows: Rows, start: Gate | None = None) -> Gate:
    """Fit all voices, from nothing or from a gate that was fitted on some of the rows."""
    vocabulary = Vocabulary.fit(rows.batch.counts, rare=rows.scarce())
    if start is None:
        start = Gate(vocabulary, Softmax.blank(len(vocabulary.columns), rows.none + 1))
        gate = _fit_voices(rows, start, STRENGTH, FIT_STEPS)
        few = rows.counts().sum() <= MOST_ROWS
        return replace(gate, kernel=_kernel(rows)) if few and gate.vectors else gate
    return _fit_voices(rows, start.over(vocabulary), STRENGTH, REFIT_STEPS)


def _fit_voices(rows: Rows, start: Gate, strength: float, steps: int) -> Gate:
    """The start's vocabulary, classes and blend; weights for these rows."""
    vectors, vocabulary = rows.batch.vectors, start.vocabulary
    fit = partial(fit_softmax, labels=rows.labels, strength=strength, steps=steps)
    ngrams = fit(vocabulary.weigh(rows.batch.counts), start=start.ngrams)
    if vectors is None:
        return replace(start, ngrams=ngrams)
    first = start.vectors or Softmax.blank(vectors.shape[1], rows.none + 1)
    kernel = _kernel(rows) if start.kernel else None
    return replace(start, ngrams=ngrams, vectors=fit(vectors, start=first), kernel=kernel)


def _kernel(rows: Rows) -> Kernel:
    own = np.flatnonzero(rows.labels < rows.none)
    assert rows.batch.vectors is not None
    return fit_kernel(rows.batch.vectors[own], rows.labels[own], rows.none)


def calibrate(rows: Rows, keep: float) -> Calibration:
    """Choose what the gate leaves open by how a gate without them treats held-out rows."""
    folds = range(FOLDS) if rows.counts().sum() < CROSS_FIT else range(1)
    trials = [Trial.of(rows, fold) for fold in folds]
    blend = _choose(trials)
    trials = [replace(trial, gate=replace(trial.gate, blend=blend)) for trial in trials]
    own = [trial.signs(trial.held.labels < rows.none) for trial in trials]
    far = [trial.signs(trial.held.labels == rows.none) for trial in trials]
    labels = np.concatenate([t.held.labels[t.held.labels < rows.none] for t in trials])
    foreign = np.concatenate([*far, *trials[0].left_out()])
    abstain = fit_abstain(np.concatenate(own), labels, foreign, adapters=rows.none, keep=keep)
    return Calibration(trials[0].gate, abstain)


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
        fitted, held = rows.take(_balanced(rows, ~mask)), rows.take(np.flatnonzero(mask))
        gate = fit_gate(fitted)
        return cls(gate, fitted, held, store(fitted, gate))

    def signs(self, mask: Mask) -> Floats:
        return signs_of(self.held.take(np.flatnonzero(mask)).batch, self.gate, self.neighbours)

    def left_out(self) -> list[Floats]:
        """Held-out rows as gates see them that were fitted without their adapters, by group."""
        adapters = np.arange(self.held.none)
        groups = [adapters[g::FOLDS] for g in range(min(FOLDS, len(adapters)))]
        return [self._unaware(group) for group in groups if len(group) < len(adapters)]

    def _unaware(self, group: Ints) -> Floats:
        left = len(self.fitted.adapters) - len(group)
        others = self.fitted.without(group, limit=-(-LEFT_OUT // left))
        strength = STRENGTH * len(self.fitted.labels) / len(others.labels)
        gate = _fit_voices(others, self.gate.without(group), strength, UNAWARE_STEPS)
        unseen = self.held.take(np.flatnonzero(np.isin(self.held.labels, group))).batch
        return signs_of(unseen, gate, self.neighbours.without(group))


def _balanced(rows: Rows, mask: Mask) -> Ints:
    """The rows under a mask, with no more of the background than of all adapters together."""
    own = np.flatnonzero(mask & (rows.labels < rows.none))
    background = np.flatnonzero(mask & (rows.labels == rows.none))
    return np.concatenate([own, background[: max(len(own), FEW_FOREIGN)]])


def _choose(trials: Sequence[Trial]) -> Blend:
    """The blend with the best balanced likelihood of the held-out rows, few errors counting too."""
    labels = np.concatenate([trial.held.labels for trial in trials])
    voices = _together([trial.gate.voices(trial.held.batch) for trial in trials])
    own = labels < voices.ngrams.shape[1] - 1
    if not len(labels):
        return Blend() if voices.vectors is None else Blend(share=SHARES[0])
    usual = float(np.quantile(voices.unknown[own], USUAL)) if own.any() else 1.0
    balance = 1 / np.maximum(np.bincount(labels), 1)[labels]

    def loss(blend: Blend) -> float:
        log_probs = blend(voices)
        wrong = log_probs.argmax(axis=1) != labels
        own_log_prob = log_probs[np.arange(len(labels)), labels]
        return float((balance * (ERROR * wrong - own_log_prob)).sum())

    shares = (1.0,) if voices.vectors is None else SHARES
    kernels = (0.0,) if voices.kernel is None else KERNELS
    rough = [Blend(s, k, t, usual) for s in shares for k in kernels for t in TEMPERATURES[::4]]
    best = min(rough, key=loss)
    return min((replace(best, temperature=t) for t in TEMPERATURES), key=loss)


def _together(parts: Sequence[Voices]) -> Voices:
    """The voices of several trials as one; a voice that one of them lacks is left out."""

    def whole(column: Sequence[Floats | None]) -> Floats | None:
        there = [part for part in column if part is not None]
        return np.concatenate(there) if len(there) == len(column) else None

    return Voices(
        np.concatenate([part.ngrams for part in parts]),
        np.concatenate([part.unknown for part in parts]),
        whole([part.vectors for part in parts]),
        whole([part.kernel for part in parts]),
    )


def signs_of(batch: Batch, gate: Gate, neighbours: Neighbours) -> Floats:
    return signs(look(batch, gate, neighbours))


def store(rows: Rows, gate: Gate) -> Neighbours:
    """The first examples of every adapter, in the order of their hashes, as neighbours."""
    limit = STORED[rows.batch.vectors is not None]
    chosen = [np.flatnonzero(rows.labels == label)[:limit] for label in range(rows.none)]
    some = rows.take(np.concatenate(chosen))
    ranks = np.concatenate([np.arange(len(part)) for part in chosen])
    return Neighbours.of(place(some.batch, gate), some.labels, ranks, some.texts)
