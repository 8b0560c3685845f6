"""Hashed n-grams of characters and words, as sparse rows.

They need no model, take well under a millisecond, survive typing errors and never download
anything. Hashing (Weinberger et al. 2009, arXiv:0902.2206) needs no dictionary: a column is the
CRC-32 of its n-gram, the same on every machine.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

MAX_CHARS = 2000  # of a text, half from its start and half from its end, are looked at

_WORD = re.compile(r"[^\W\d_]+|\d+")


class Sparse(NamedTuple):
    """Rows of few non-zeros: row i has `columns[starts[i]:starts[i + 1]]` and the like values."""

    starts: Ints  # [N + 1]
    columns: Ints
    values: Floats

    @property
    def num_rows(self) -> int:
        return len(self.starts) - 1

    def row(self, i: int) -> tuple[Ints, Floats]:
        part = slice(self.starts[i], self.starts[i + 1])
        return self.columns[part], self.values[part]

    def part(self, rows: slice) -> Sparse:
        """Some neighbouring rows, nothing copied."""
        starts = self.starts[rows.start : rows.stop + 1]
        values = slice(starts[0], starts[-1])
        return Sparse(starts - starts[0], self.columns[values], self.values[values])

    def take(self, rows: Ints) -> Sparse:
        lengths = np.diff(self.starts)[rows]
        starts = np.r_[0, np.cumsum(lengths)]
        where = np.arange(starts[-1]) + np.repeat(self.starts[rows] - starts[:-1], lengths)
        return Sparse(starts, self.columns[where], self.values[where])

    def followed_by(self, others: Sparse) -> Sparse:
        """These rows, and then the others."""
        return Sparse(
            np.r_[self.starts, others.starts[1:] + self.starts[-1]],
            np.r_[self.columns, others.columns],
            np.r_[self.values, others.values],
        )

    def squares(self) -> Floats:
        """The squared length of each row, [N]."""
        row = np.repeat(np.arange(self.num_rows), np.diff(self.starts))
        return np.bincount(row, self.values**2, minlength=self.num_rows).astype(np.float32)

    def dot(self, weights: Floats) -> Floats:
        """[N, D] @ [D, K]; rows that are fewer than the columns are taken one by one, in place."""
        if self.num_rows < weights.shape[1]:
            return self._each_dot(weights)
        terms = self.values[:, None] * weights[self.columns]
        sums = np.add.reduceat(
            np.concatenate([terms, np.zeros_like(weights[:1])]), self.starts[:-1]
        )
        sums[np.diff(self.starts) == 0] = 0
        return cast(Floats, sums)

    def _each_dot(self, weights: Floats) -> Floats:
        found = np.empty((self.num_rows, weights.shape[1]), np.float32)
        for i, sums in enumerate(found):
            columns, values = self.row(i)
            np.dot(values, weights[columns], out=sums)
        return found


def clip(text: str) -> str:
    """The start and the end of a long text, where a request says what it wants."""
    if len(text) <= MAX_CHARS:
        return text
    return text[: MAX_CHARS // 2] + " " + text[-MAX_CHARS // 2 :]


def words(text: str) -> list[str]:
    """Lower-case words; every number is "0", apostrophes join and other punctuation separates.

    >>> words("Don't charge me $12.50!")
    ['dont', 'charge', 'me', '0', '0']
    """
    plain = clip(text).lower().replace("'", "").replace("\u2019", "")
    return ["0" if word.isdigit() else word for word in _WORD.findall(plain)]


@dataclass(frozen=True, slots=True)
class NgramEncoder:
    """Characters 2-5 inside each word, words, and pairs of neighbouring words, hashed by CRC-32.

    With `seams` also the one or two characters to either side of the space between two words: the
    ends of words go with the beginnings of the next, whatever the words are. A router on n-grams
    alone is better for it; beside a sentence encoder it would only cost time.

    `encode` gives plain sublinear counts of unit length, [N, 2**bits], mostly zeros: meant for
    small batches. The gate uses the sparse forms, and weighs them by the idf of its own rows.
    """

    bits: int = 17
    seams: bool = False

    @property
    def digest(self) -> str:
        return f"ngrams-{1 + self.seams}-{self.bits}"

    @property
    def size(self) -> int:
        return 1 << self.bits

    def terms(self, text: str) -> tuple[Ints, Floats]:
        """The columns of one text, ascending, and 1 + log(count) of each."""
        return self.matrix([text]).row(0)

    def labelled(self, text: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Each word and pair of neighbouring words of a text, with the columns it sets."""
        found = words(text)
        for word in found:
            yield word, _word_columns(word, self.bits)
        for left, right in zip(["^", *found], [*found, "$"], strict=True):
            seam = _seam(left[-2:], right[:2], self.bits) if self.seams else ()
            yield f"{left} {right}", (_column(f"2 {left} {right}", self.bits), *seam)

    def matrix(self, texts: Sequence[str]) -> Sparse:
        """The columns of many texts, ascending, and 1 + log(count) of each, [N, 2**bits]."""
        found = [list(chain.from_iterable(c for _, c in self.labelled(t))) for t in texts]
        row = np.repeat(np.arange(len(found)), [len(columns) for columns in found])
        keys = np.fromiter(chain.from_iterable(found), np.int64, len(row)) | row << self.bits
        keys, counts = np.unique(keys, return_counts=True)
        starts = np.searchsorted(keys, np.arange(len(found) + 1) << self.bits)
        return Sparse(starts, keys & (self.size - 1), np.log(counts, dtype=np.float32) + 1)

    def encode(self, texts: Sequence[str]) -> Floats:
        dense = np.zeros((len(texts), self.size), np.float32)
        for row, text in zip(dense, texts, strict=True):
            columns, values = self.terms(text)
            row[columns] = values / max(float(np.linalg.norm(values)), 1e-9)
        return dense


@lru_cache(maxsize=50_000)
def _word_columns(word: str, bits: int) -> tuple[int, ...]:
    marked = f"<{word}>"
    grams = [marked[i : i + n] for n in (2, 3, 4, 5) for i in range(len(marked) - n + 1)]
    return tuple(_column(gram, bits) for gram in [*grams, f"1 {word}"])


@lru_cache(maxsize=50_000)
def _seam(end: str, start: str, bits: int) -> tuple[int, ...]:
    """What stands to either side of a space: one or two characters each."""
    sides = {(end[-i:], start[:j]) for i in (1, 2) for j in (1, 2)}
    return tuple(_column(f"3 {left} {right}", bits) for left, right in sorted(sides))


def _column(gram: str, bits: int) -> int:
    return zlib.crc32(gram.encode()) & ((1 << bits) - 1)


@dataclass(frozen=True, slots=True, eq=False)
class Vocabulary:
    """The columns worth keeping, and how much each says (inverse document frequency).

    A column that fewer than two rows set is unknown. Unknown columns still lengthen a text's
    vector, with the highest idf, so a text of mostly new words looks like nothing that was seen.
    """

    columns: Ints  # [F], ascending
    idf: Floats  # [F]
    rare: float  # the idf of an unknown column

    @classmethod
    def fit(cls, counts: Sparse, rare: Ints | None = None) -> Vocabulary:
        """`rare` numbers the rows of which every column is kept, however few rows set it."""
        columns, rows = np.unique(counts.columns, return_counts=True)
        known = rows >= 2
        if rare is not None:
            known |= np.isin(columns, counts.take(rare).columns)
        total = counts.num_rows + 1
        idf = np.log(total / (1 + rows[known])) + 1
        return cls(columns[known], idf.astype(np.float32), float(np.log(total / 2) + 1))

    def wider(self, counts: Sparse) -> Vocabulary:
        """With every column of some rows; those that are new say as much as an unknown one did."""
        columns = np.union1d(self.columns, counts.columns)
        idf = np.full(len(columns), self.rare, np.float32)
        idf[np.searchsorted(columns, self.columns)] = self.idf
        return Vocabulary(columns, idf, self.rare)

    def places(self, columns: Ints) -> tuple[Ints, NDArray[np.bool_]]:
        """Which of some columns are known, and where those stand."""
        if not len(self.columns):
            return columns[:0], np.zeros(len(columns), bool)
        found = np.searchsorted(self.columns, columns).clip(max=len(self.columns) - 1)
        known = self.columns[found] == columns
        return found[known], known

    def weigh(self, counts: Sparse) -> Sparse:
        """Rows over the F known columns: counts times idf, shorter than one by what is unknown."""
        places, known = self.places(counts.columns)
        idf = np.full(len(known), self.rare, np.float32)
        idf[known] = self.idf[places]
        values = counts.values * idf
        row = np.repeat(np.arange(counts.num_rows), np.diff(counts.starts))
        length = np.sqrt(np.bincount(row, values * values, minlength=counts.num_rows))
        values = (values / np.maximum(length, 1e-9)[row]).astype(np.float32)
        kept = np.bincount(row[known], minlength=counts.num_rows)
        return Sparse(np.r_[0, np.cumsum(kept)], places, values[known])
