"""The stored examples nearest to a query: evidence for the abstain score, reasons for people."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import cast

import numpy as np

from loramix.route.ngrams import Floats, Ints, Sparse


@dataclass(frozen=True)
class Neighbours:
    """Examples as unit rows, sentence vectors where there are any and weighed n-grams where not."""

    rows: Floats | Sparse  # [E, D]
    labels: Ints  # [E], the adapter of each
    ranks: Ints  # [E], its place among that adapter's examples
    texts: tuple[str, ...]

    def similarities(self, query: Floats | Sparse) -> Floats:
        """Cosines of every query with every example, [N, E]."""
        if isinstance(query, Sparse) or isinstance(self.rows, Sparse):
            sparse = cast(Sparse, query)
            found = np.zeros((sparse.num_rows, len(self.labels)), np.float32)
            for i, row in enumerate(found):
                row[:] = self._cosines(*sparse.row(i))
            return found
        return query @ self.rows.T

    def without(self, adapters: Ints) -> Neighbours:
        """The examples of all other adapters."""
        kept = np.flatnonzero(~np.isin(self.labels, adapters))
        rows = self.rows.take(kept) if isinstance(self.rows, Sparse) else self.rows[kept]
        return Neighbours(
            rows, self.labels[kept], self.ranks[kept], tuple(self.texts[i] for i in kept)
        )

    @cached_property
    def _postings(self) -> tuple[Ints, Ints, Floats]:
        """The examples that have a column, column by column: starts [D + 1], examples, values."""
        rows = cast(Sparse, self.rows)
        example = np.repeat(np.arange(rows.num_rows), np.diff(rows.starts))
        order = np.argsort(rows.columns, kind="stable")
        width = int(rows.columns.max(initial=-1)) + 2
        starts = np.searchsorted(rows.columns[order], np.arange(width))
        return starts, example[order], rows.values[order]

    def _cosines(self, columns: Ints, values: Floats) -> Floats:
        starts, examples, weights = self._postings
        inside = columns < len(starts) - 1
        columns, values = columns[inside], values[inside]
        first, lengths = starts[columns], starts[columns + 1] - starts[columns]
        jump = (
            np.repeat(first - np.r_[0, np.cumsum(lengths)[:-1]], lengths) if len(columns) else first
        )
        index = jump + np.arange(len(jump))
        products = np.repeat(values, lengths) * weights[index]
        return np.bincount(examples[index], products, minlength=len(self.labels)).astype(np.float32)


def best(cosines: Floats, count: int) -> Floats:
    """The highest of each row, best first, [N, count]; 0 where there are fewer."""
    found = np.zeros((len(cosines), count), np.float32)
    width = min(count, cosines.shape[1])
    if width:
        top = np.partition(cosines, -width, axis=1)[:, -width:]  # sorting all takes longer
        found[:, :width] = np.sort(top, axis=1)[:, ::-1]
    return found
