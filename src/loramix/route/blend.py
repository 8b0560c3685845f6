"""The gate: calibrated log-probabilities over the adapters and the background.

Its two halves are multinomial logistic regressions, one on weighed n-grams and one, where there is
a sentence encoder, on its vectors. Their log-probabilities are averaged and sharpened.
"""

from __future__ import annotations

from dataclasses import dataclass

from loramix.route.abstain import NEIGHBOURS, Evidence
from loramix.route.neighbours import Neighbours, best
from loramix.route.ngrams import Floats, Ints, Sparse, Vocabulary
from loramix.route.rows import Batch
from loramix.route.softmax import Softmax, log_softmax


@dataclass(frozen=True, slots=True, eq=False)
class Gate:
    """Calibrated log-probabilities over the adapters and the background."""

    vocabulary: Vocabulary
    ngrams: Softmax
    vectors: Softmax | None  # None where there is no sentence encoder
    share: float = 1.0  # of the n-grams in the blend
    temperature: float = 1.0

    def log_probs(self, batch: Batch) -> Floats:
        """[N, K + 1], the background last."""
        return blend(self.halves(batch), self.share, self.temperature)

    def halves(self, batch: Batch) -> tuple[Floats, Floats | None]:
        sparse = self.ngrams.log_probs(self.vocabulary.weigh(batch.counts))
        if self.vectors is None or batch.vectors is None:
            return sparse, None
        return sparse, self.vectors.log_probs(batch.vectors)

    def without(self, classes: Ints) -> Gate:
        vectors = self.vectors.without(classes) if self.vectors else None
        return Gate(
            self.vocabulary, self.ngrams.without(classes), vectors, self.share, self.temperature
        )


def place(batch: Batch, gate: Gate) -> Floats | Sparse:
    """Where texts lie among the stored examples: sentence vectors if any, else weighed n-grams."""
    return gate.vocabulary.weigh(batch.counts) if batch.vectors is None else batch.vectors


def look(batch: Batch, gate: Gate, neighbours: Neighbours) -> Evidence:
    cosines = neighbours.similarities(place(batch, gate))
    return Evidence(gate.log_probs(batch), best(cosines, NEIGHBOURS))


def blend(halves: tuple[Floats, Floats | None], share: float, temperature: float) -> Floats:
    sparse, dense = halves
    mean = sparse if dense is None else share * sparse + (1 - share) * dense
    return log_softmax(mean / temperature)
