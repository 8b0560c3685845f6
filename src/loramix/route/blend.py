"""The gate: calibrated log-probabilities over the adapters and the background.

Three voices, each a model of its own: a softmax on weighed n-grams; where there is a sentence
encoder a softmax on its vectors; and where examples are few, a kernel on these vectors. The average
of their log-probabilities is sharpened. How much each says, held-out rows choose. A text of unknown
words, most of all one full of typing errors, is left to the n-grams: a sentence encoder reads such
words as other words, n-grams as nearly the same.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple, cast

import numpy as np

from loramix.route.abstain import NEIGHBOURS, Evidence
from loramix.route.kernel import Kernel
from loramix.route.neighbours import Neighbours, best
from loramix.route.ngrams import Floats, Ints, Sparse, Vocabulary
from loramix.route.rows import Batch
from loramix.route.softmax import Softmax, log_softmax

GARBLED, SPAN = 0.85, 0.3  # the n-grams' share of a garbled text; more unknown than usual by this
LIKELY = 5  # adapters whose examples a query is compared with: the time does not grow with others


class Voices(NamedTuple):
    """What each model says of N texts, in log-probabilities."""

    ngrams: Floats  # [N, K + 1]
    unknown: Floats  # [N], share of a text's n-grams that no fitted row had
    vectors: Floats | None  # [N, K + 1]
    kernel: Floats | None  # [N, K]


@dataclass(frozen=True, slots=True)
class Blend:
    """How much each voice says; `temperature` sharpens or softens the sum."""

    share: float = 1.0  # of the n-grams
    kernel: float = 0.0  # of the kernel in the rest
    temperature: float = 1.0
    usual: float = 1.0  # unknown share that nine in ten of the adapters' own queries stay below

    def __call__(self, voices: Voices) -> Floats:
        """[N, K + 1], the background last."""
        mean = voices.ngrams
        if voices.vectors is not None:
            excess = cast(Floats, ((voices.unknown - self.usual) / SPAN).clip(0, 1))
            share = cast(Floats, self.share + max(GARBLED - self.share, 0) * excess)
            mean = share[:, None] * mean + (1 - share)[:, None] * self._dense(voices)
        return log_softmax(mean / np.float32(self.temperature))

    def _dense(self, voices: Voices) -> Floats:
        """The kernel knows no background: it moves probability among the adapters only."""
        assert voices.vectors is not None
        if voices.kernel is None or not self.kernel:
            return voices.vectors
        adapters = voices.vectors[:, :-1]
        total = np.logaddexp.reduce(adapters, axis=1)[:, None]
        moved = (1 - self.kernel) * (adapters - total) + self.kernel * voices.kernel
        return np.concatenate([log_softmax(moved) + total, voices.vectors[:, -1:]], axis=1)


@dataclass(frozen=True, slots=True, eq=False)
class Gate:
    """Calibrated log-probabilities over the adapters and the background."""

    vocabulary: Vocabulary
    ngrams: Softmax
    vectors: Softmax | None = None  # None where there is no sentence encoder
    kernel: Kernel | None = None  # None there, and where there are many examples
    blend: Blend = Blend()

    def log_probs(self, batch: Batch) -> Floats:
        """[N, K + 1], the background last."""
        return self.blend(self.voices(batch))

    def voices(self, batch: Batch) -> Voices:
        weighed = self.vocabulary.weigh(batch.counts)
        sparse, unknown = self.ngrams.log_probs(weighed), 1 - weighed.squares()
        if self.vectors is None or batch.vectors is None:
            return Voices(sparse, unknown, None, None)
        kernel = self.kernel.log_probs(batch.vectors) if self.kernel else None
        return Voices(sparse, unknown, self.vectors.log_probs(batch.vectors), kernel)

    def over(self, vocabulary: Vocabulary) -> Gate:
        """The same weights for another vocabulary; columns that are new to it weigh nothing."""
        weights = np.zeros((len(vocabulary.columns), len(self.ngrams.bias)), np.float32)
        places, known = self.vocabulary.places(vocabulary.columns)
        weights[known] = self.ngrams.weights[places]
        return replace(self, vocabulary=vocabulary, ngrams=Softmax(weights, self.ngrams.bias))

    def without(self, classes: Ints) -> Gate:
        """The same models with some classes struck out."""
        return replace(
            self,
            ngrams=self.ngrams.without(classes),
            vectors=self.vectors and self.vectors.without(classes),
            kernel=self.kernel and self.kernel.without(classes),
        )


def place(batch: Batch, gate: Gate) -> Floats | Sparse:
    """Where texts lie among the stored examples: sentence vectors if any, else weighed n-grams."""
    return gate.vocabulary.weigh(batch.counts) if batch.vectors is None else batch.vectors


def look(batch: Batch, gate: Gate, neighbours: Neighbours) -> Evidence:
    return compare(batch, gate, neighbours)[0]


def compare(batch: Batch, gate: Gate, neighbours: Neighbours) -> tuple[Evidence, Floats]:
    """What the gate sees, and the cosines with the examples of the likely adapters, [N, E]."""
    log_probs = gate.log_probs(batch)
    likely = np.argsort(-log_probs[:, :-1], axis=1, kind="stable")[:, :LIKELY]
    cosines = neighbours.similarities(place(batch, gate), likely)
    near = best(cosines, NEIGHBOURS)
    return Evidence(log_probs, near, neighbours.stands_out(cosines)), cosines
