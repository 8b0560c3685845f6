"""The stored examples nearest to a query, found among many that were not compared."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from loramix.route.neighbours import Neighbours, best
from loramix.route.ngrams import Floats, Sparse

COSINES = arrays(
    np.float32,
    array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=12),
    elements=st.one_of(st.just(0.0), st.floats(-1, 1, width=32)),
)


@given(COSINES, st.integers(1, 6))
def test_the_best_are_what_sorting_all_finds(cosines: Floats, count: int) -> None:
    ranked = -np.sort(-cosines, axis=1)[:, :count]
    missing = count - ranked.shape[1]
    np.testing.assert_array_equal(best(cosines, count), np.pad(ranked, ((0, 0), (0, missing))))


def cloud(count: int, spread: float) -> Floats:
    rows = np.eye(1, 8, dtype=np.float32) + spread * np.random.default_rng(count).standard_normal(
        (count, 8), np.float32
    )
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_what_is_as_near_stands_out_more_among_examples_that_are_alike() -> None:
    dense, wide = cloud(40, 0.05), cloud(41, 0.5)
    rows, labels = np.concatenate([dense, wide]), np.repeat([0, 1], [40, 41])
    near = Neighbours.of(rows, labels, np.arange(81), ("",) * 81)
    assert near.density[:40].min() > near.density[40:].max()
    cosines = np.zeros((3, 81), np.float32)
    cosines[0, :40] = cosines[1, 40:] = 0.8
    among_alike, among_wide, nowhere = near.stands_out(cosines)
    assert among_alike < among_wide
    assert nowhere == 0


def test_an_adapter_that_joins_lies_as_densely_as_if_it_had_always_been_there() -> None:
    first, second = cloud(30, 0.3), cloud(20, 0.6)
    labels = np.repeat([0, 1], [20, 30])
    texts = tuple(str(i) for i in range(50))
    both = Neighbours.of(np.concatenate([second, first]), labels, np.r_[:20, :30], texts)
    alone = Neighbours.of(first, np.zeros(30, np.int64), np.arange(30), texts[20:])
    joined = alone.with_class(0, second, texts[:20])
    np.testing.assert_allclose(joined.density, both.density, atol=1e-6)
    np.testing.assert_allclose(joined.without(np.array([0])).density, alone.density)


def test_sparse_examples_lie_as_densely_as_dense_ones() -> None:
    rows = cloud(12, 0.4)
    sparse = Sparse(np.arange(0, 97, 8), np.tile(np.arange(8), 12), rows.ravel())
    labels, texts = np.repeat([0, 1, 2], [6, 5, 1]), ("",) * 12
    a, b = (Neighbours.of(each, labels, np.arange(12), texts).density for each in (rows, sparse))
    np.testing.assert_allclose(a, b, atol=1e-5)
    np.testing.assert_allclose(a[-1], a[:-1].mean(), atol=1e-5)
