"""Two skills in one query: cut it in two and see whether the halves want different adapters.

The gate reads a joined query as one text and mostly sees its louder half. No list of joining words
is needed to find the seam: of all cuts between words, the n-grams alone, which cost little, say
which are most worth it, and only the halves of these are read by the whole gate. The best cut is
the one where a left half of one adapter and a right half of another are likeliest together.

A generic half ("could you please tell me") looks like nobody's or like anybody's, so a second
adapter must earn its place in three ways: each half prefers its adapter to the other half's, is
sure of it, and the whole query does not rule it out. The router asks for a fourth: each half alone
is in scope.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import numpy as np

from loramix.route.blend import Gate
from loramix.route.encode import Encoder
from loramix.route.ngrams import Floats, Ints, NgramEncoder
from loramix.route.rows import Batch, read

LEAST_WORDS = 3  # in a half
MOST_WORDS = 60  # in a query: a longer one is a document, with words of many trades in it
CUTS = 2  # that the whole gate reads
SURE = 2.0  # weight of the halves' log-probabilities in the lead
ENOUGH = 1.0  # lead of two over one; 3.5 % of CLINC150's single validation queries reach it


class Halves(NamedTuple):
    """The best cut of a query into the parts of two different adapters."""

    parts: tuple[str, str]
    adapters: tuple[int, int]
    batch: Batch  # the two parts as read
    log_probs: tuple[float, float]  # of each part's adapter, given the part alone
    lead: float  # of two adapters over one

    @property
    def two(self) -> bool:
        return self.lead >= ENOUGH


def cut(
    query: str, whole: Floats, gate: Gate, ngrams: NgramEncoder, encoder: Encoder | None
) -> Halves | None:
    """The best cut; `whole` has the log-probabilities of the query as one text, [K + 1].

    None where two parts are not looked for: one adapter only, or too few or too many words.
    """
    parts = _cuts(query.split()) if len(whole) > 2 else []
    if not parts:
        return None
    lefts, rights = zip(*parts, strict=True)
    weighed = gate.vocabulary.weigh(ngrams.matrix([*lefts, *rights]))
    left, right = np.split(gate.ngrams.log_probs(weighed), 2)
    likely = np.argsort(-_pairs(left, right)[0], kind="stable")[:CUTS]
    lefts, rights = zip(*(parts[i] for i in likely), strict=True)
    batch = read([*lefts, *rights], ngrams, encoder)
    left, right = np.split(gate.log_probs(batch), 2)
    sums, first, second = _pairs(left, right)
    i = int(sums.argmax())
    a, b = pair = int(first[i]), int(second[i])
    return Halves(
        parts=(lefts[i], rights[i]),
        adapters=pair,
        batch=batch.take(np.array([i, len(likely) + i])),
        log_probs=(float(left[i, a]), float(right[i, b])),
        lead=_lead(left[i], right[i], whole, pair),
    )


def _cuts(words: list[str]) -> list[tuple[str, str]]:
    if len(words) > MOST_WORDS:
        return []
    places = range(LEAST_WORDS, len(words) - LEAST_WORDS + 1)
    return [(" ".join(words[:i]), " ".join(words[i:])) for i in places]


def _pairs(left: Floats, right: Floats) -> tuple[Floats, Ints, Ints]:
    """For each cut the likeliest two different adapters of its halves, and their log-probability.

    They are the best of each half, or where these are one, the best of one and the other's second.
    """
    left, right = left[:, :-1], right[:, :-1]  # the background is nobody's skill
    rows = np.arange(len(left))
    a, b = left.argmax(axis=1), right.argmax(axis=1)
    others, same = (_but(left, b), _but(right, a)), a == b
    move = same & (others[0][0] + right[rows, b] > left[rows, a] + others[1][0])
    stay = same & ~move
    first, second = np.where(move, others[0][1], a), np.where(stay, others[1][1], b)
    return cast(Floats, left[rows, first] + right[rows, second]), first, second


def _but(log_probs: Floats, struck: Ints) -> tuple[Floats, Ints]:
    """The best of each row without one of its columns, and which it is."""
    rows = np.arange(len(log_probs))
    rest = log_probs.copy()
    rest[rows, struck] = -np.inf
    found = rest.argmax(axis=1)
    return rest[rows, found], found


def _lead(left: Floats, right: Floats, whole: Floats, pair: tuple[int, int]) -> float:
    a, b = pair
    apart = min(left[a] - left[b], right[b] - right[a])
    return float(apart + SURE * min(left[a], right[b]) + min(whole[a], whole[b]))
