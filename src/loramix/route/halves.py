"""Two skills in one query: cut it in two and see whether the halves want different adapters.

The gate reads a joined query as one text and mostly sees its louder half. No list of joining words
is needed to find the seam, and no cut needs an encoder of its own: the tokens of the whole, read
once, are averaged to either side of every cut between words. The best cut is the one where a left
half of one adapter and a right half of another are likeliest together. The tokens of a half have
heard of the other half, so this is a sketch: where it is neither clear nor hopeless, the halves of
that one cut are encoded on their own.

A generic half ("could you please tell me") looks like nobody's or like anybody's, so a second
adapter must earn its place in three ways: each half prefers its adapter to the other half's, is
sure of it, and the whole query does not rule it out. Of halves that were encoded the router asks
for a fourth: each alone is in scope.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple, cast

import numpy as np

from loramix.route.blend import Gate
from loramix.route.encode import Encoder, Tokens, unit
from loramix.route.ngrams import MAX_CHARS, Floats, Ints, NgramEncoder
from loramix.route.rows import Batch, read

LEAST_WORDS = 3  # in a half
MOST_WORDS = 60  # in a query: a longer one is a document, with words of many trades in it
SURE = 2.0  # weight of the halves' log-probabilities in the lead
HOPE, CLEAR = -6.0, 4.0  # leads of a sketch between which the halves are encoded
ENOUGH = 1.0  # lead of two over one; 3.5 % of CLINC150's single validation queries reach it


class Halves(NamedTuple):
    """The best cut of a query into the parts of two different adapters."""

    parts: tuple[str, str]
    adapters: tuple[int, int]
    batch: Batch  # the two parts as read
    log_probs: tuple[float, float]  # of each part's adapter, given the part alone
    lead: float  # of two adapters over one
    sketched: bool  # not encoded on their own: `batch` is too vague for the in-scope score

    @property
    def two(self) -> bool:
        return self.lead >= ENOUGH


def cut(
    query: str,
    whole: Floats,
    gate: Gate,
    ngrams: NgramEncoder,
    encoder: Encoder | None,
    tokens: Tokens | None = None,
) -> Halves | None:
    """The best cut; `whole` has the log-probabilities of the query as one text, [K + 1].

    None where two parts are not looked for: one adapter only, or too few or too many words.
    """
    places = _places(query) if len(whole) > 2 else []
    if not places:
        return None
    parts = [(query[:i].rstrip(), query[i:]) for i in places]
    counts = ngrams.matrix([left for left, _ in parts] + [right for _, right in parts])
    found = _best(parts, Batch(counts, _sketch(tokens, places)), whole, gate, sketched=True)
    if not HOPE <= found.lead < CLEAR:
        return found
    return _best([found.parts], read(found.parts, ngrams, encoder), whole, gate, sketched=False)


def _best(
    parts: Sequence[tuple[str, str]], batch: Batch, whole: Floats, gate: Gate, *, sketched: bool
) -> Halves:
    """The likeliest of some cuts; the batch has all left parts, then all right ones."""
    left, right = np.split(gate.log_probs(batch), 2)
    sums, first, second = _pairs(left, right)
    i = int(sums.argmax())
    a, b = pair = int(first[i]), int(second[i])
    return Halves(
        parts=parts[i],
        adapters=pair,
        batch=batch.take(np.array([i, len(parts) + i])),
        log_probs=(float(left[i, a]), float(right[i, b])),
        lead=_lead(left[i], right[i], whole, pair),
        sketched=sketched,
    )


def _places(query: str) -> list[int]:
    """The characters at which a second part may begin."""
    starts = [found.start() for found in re.finditer(r"\S+", query)]
    if len(starts) > MOST_WORDS or len(query) > MAX_CHARS:
        return []
    return starts[LEAST_WORDS : len(starts) - LEAST_WORDS + 1]


def _sketch(tokens: Tokens | None, places: Sequence[int]) -> Floats | None:
    """Vectors of all left and all right parts from the tokens of the whole, [2 C, D]."""
    if tokens is None or len(tokens.starts) < 4:  # fewer than two tokens between the ends
        return None
    sums, starts = np.cumsum(tokens.states[1:-1], axis=0), tokens.starts[1:-1]
    last = np.searchsorted(starts, places).clip(1, len(sums) - 1) - 1
    return unit(np.concatenate([sums[last], sums[-1] - sums[last]]))


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
