"""The stored examples nearest to a query: evidence for the abstain score, reasons for people."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import cast

import numpy as np

from loramix.route.ngrams import Floats, Ints, Sparse, Vocabulary

CLOSE = 20  # others of its adapter that tell how densely an example lies
CIRCLE = 30  # nearest examples, whose density a query is held against


@dataclass(frozen=True)
class Neighbours:
    """Examples as unit rows, sentence vectors where there are any and weighed n-grams where not."""

    rows: Floats | Sparse  # [E, D]
    labels: Ints  # [E], the adapter of each, ascending where some are asked for
    ranks: Ints  # [E], its place among that adapter's examples
    texts: tuple[str, ...]
    density: Floats  # [E], mean cosine with the CLOSE nearest others of its adapter

    @classmethod
    def of(
        cls, rows: Floats | Sparse, labels: Ints, ranks: Ints, texts: tuple[str, ...]
    ) -> Neighbours:
        """Labels ascend. An example that is its adapter's only one lies as densely as others do."""
        parts = np.split(np.arange(len(labels)), np.flatnonzero(np.diff(labels)) + 1)
        density = np.concatenate([_density(_taken(rows, part)) for part in parts])
        usual = np.nanmean(density) if np.isfinite(density).any() else 0
        return cls(rows, labels, ranks, texts, np.nan_to_num(density, nan=usual))

    def similarities(self, query: Floats | Sparse, of: Ints | None = None) -> Floats:
        """Cosines of every query with the examples, [N, E]; those not of its adapters are 0.

        `of` has each query's adapters, [N, C]; without it every example is compared.
        """
        if of is None and not isinstance(self.rows, Sparse) and not isinstance(query, Sparse):
            return cast(Floats, query @ self.rows.T)  # many queries in one product
        found = np.zeros((_count(query), len(self.labels)), np.float32)
        for i, row in enumerate(found):
            one = _vector(query, i, self._width)
            for part in [slice(0, len(row))] if of is None else map(self._part, of[i].tolist()):
                row[part] = self._cosines(part, one)
        return found

    def stands_out(self, cosines: Floats) -> Floats:
        """How much nearer its CIRCLE nearest examples are to a query than to their own kind, [N].

        A query is foreign sooner where examples are all alike than where they lie far apart: the
        idea of the local outlier factor (Breunig et al. 2000).
        """
        found = np.zeros(len(cosines), np.float32)
        for i, row in enumerate(cosines):
            if len(compared := np.flatnonzero(row)):
                order = np.argpartition(-row[compared], min(CIRCLE, len(compared)) - 1)
                near = compared[order[:CIRCLE]]
                found[i] = (row[near] - self.density[near]).mean()
        return found

    def without(self, adapters: Ints) -> Neighbours:
        """The examples of all other adapters, which are numbered anew."""
        kept = np.flatnonzero(~np.isin(self.labels, adapters))
        labels = np.unique(self.labels[kept], return_inverse=True)[1]
        texts = tuple(self.texts[i] for i in kept)
        return Neighbours(self.take(kept), labels, self.ranks[kept], texts, self.density[kept])

    def take(self, examples: Ints) -> Floats | Sparse:
        """Where some of the examples lie."""
        return _taken(self.rows, examples)

    def over(self, before: Vocabulary, after: Vocabulary) -> Neighbours:
        """The same examples in the columns of a wider vocabulary."""
        if not isinstance(self.rows, Sparse):
            return self
        columns = np.searchsorted(after.columns, before.columns)[self.rows.columns]
        return replace(self, rows=self.rows._replace(columns=columns))

    def with_class(self, label: int, rows: Floats | Sparse, texts: tuple[str, ...]) -> Neighbours:
        """The first examples of one more adapter put in; labels from its own on move up."""
        labels = np.r_[self.labels + (self.labels >= label), np.full(len(texts), label)]
        order = np.argsort(labels, kind="stable")
        all_texts = (*self.texts, *texts)
        density = np.nan_to_num(_density(rows), nan=self.density.mean())
        return Neighbours(
            _joined(self.rows, rows, order),
            labels[order],
            np.r_[self.ranks, np.arange(len(texts))][order],
            tuple(all_texts[i] for i in order),
            np.r_[self.density, density][order],
        )

    @cached_property
    def _firsts(self) -> list[int]:
        """Where the examples of each adapter begin, and where the last one's end."""
        return cast(list[int], np.searchsorted(self.labels, range(self.labels[-1] + 2)).tolist())

    @cached_property
    def _width(self) -> int:
        return int(self.rows.columns.max(initial=-1)) + 1 if isinstance(self.rows, Sparse) else 0

    def _part(self, adapter: int) -> slice:
        return slice(*self._firsts[adapter : adapter + 2])

    def _cosines(self, part: slice, query: Floats) -> Floats:
        if isinstance(self.rows, Sparse):
            return self.rows.part(part).dot(query[:, None])[:, 0]
        return cast(Floats, self.rows[part] @ query)


def _joined(first: Floats | Sparse, second: Floats | Sparse, order: Ints) -> Floats | Sparse:
    if isinstance(first, Sparse) and isinstance(second, Sparse):
        return first.followed_by(second).take(order)
    return cast(Floats, np.concatenate([first, second])[order])


def _taken(rows: Floats | Sparse, which: Ints) -> Floats | Sparse:
    return rows.take(which) if isinstance(rows, Sparse) else rows[which]


def _density(rows: Floats | Sparse) -> Floats:
    """Mean cosine of each with the CLOSE nearest others, [N]; nan of one without others."""
    count = _count(rows)
    if count < 2:
        return np.full(count, np.nan, np.float32)
    cosines = _products(rows)
    np.fill_diagonal(cosines, -np.inf)
    width = min(CLOSE, count - 1)
    return cast(Floats, np.partition(cosines, -width, axis=1)[:, -width:].mean(axis=1))


def _products(rows: Floats | Sparse) -> Floats:
    """Of each row with each, [N, N]."""
    if not isinstance(rows, Sparse):
        return cast(Floats, rows @ rows.T)
    from scipy.sparse import csr_matrix

    matrix = csr_matrix((rows.values, rows.columns, rows.starts))
    return cast(Floats, (matrix @ matrix.T).toarray())


def _count(rows: Floats | Sparse) -> int:
    return rows.num_rows if isinstance(rows, Sparse) else len(rows)


def _vector(rows: Floats | Sparse, i: int, width: int) -> Floats:
    """One row, as a dense one."""
    if not isinstance(rows, Sparse):
        return cast(Floats, rows[i])
    columns, values = rows.row(i)
    dense = np.zeros(width, np.float32)
    inside = columns < width
    dense[columns[inside]] = values[inside]
    return dense


def best(cosines: Floats, count: int) -> Floats:
    """The highest of each row, best first, [N, count]; 0 where there are fewer.

    Most are 0, of examples that were not compared; as many of these as may be among the highest
    stand for all. To find the highest among thousands of equal numbers takes longer.
    """
    found = np.zeros((len(cosines), count), np.float32)
    for best, row in zip(found, cosines, strict=True):
        compared = row[row != 0]
        rest = np.zeros(min(count, len(row) - len(compared)), np.float32)
        top = np.sort(np.concatenate([compared, rest]))[::-1][:count]
        best[: len(top)] = top
    return found
