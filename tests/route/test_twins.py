"""Columns that always come together are fitted as one, and nothing else is."""

from __future__ import annotations

import numpy as np
from scipy.sparse import csr_matrix

from loramix.route.ngrams import Floats, Ints, Sparse
from loramix.route.softmax import Softmax, fit_softmax
from loramix.route.twins import Twins

WIDTH = 8


def with_twins() -> tuple[Floats, Ints]:
    """Forty rows of three classes; columns 4 and 6 are as 1 is, 5 is as 2 but once, 7 is empty."""
    rng = np.random.default_rng(0)
    labels = np.arange(40) % 3
    rows = np.zeros((40, WIDTH), np.float32)
    rows[:, :4] = (rng.random((40, 4)) < 0.5) * rng.random((40, 4))
    rows[np.arange(40), labels] += 0.5
    rows[:, 4] = rows[:, 6] = rows[:, 1]
    rows[:, 5] = rows[:, 2]
    rows[3, 5] += 0.25
    return rows, labels


def sparse(rows: Floats) -> Sparse:
    found = csr_matrix(rows)
    return Sparse(found.indptr.astype(np.int64), found.indices.astype(np.int64), found.data)


def test_only_columns_alike_in_all_rows_are_one() -> None:
    rows, _ = with_twins()
    twins = Twins.of(sparse(rows), WIDTH)
    assert twins.groups[1] == twins.groups[4] == twins.groups[6]
    assert len(set(twins.groups.tolist())) == WIDTH - 2 == twins.rows.shape[1]


def test_weights_of_groups_say_what_those_of_columns_say() -> None:
    rows, _ = with_twins()
    twins = Twins.of(sparse(rows), WIDTH)
    weights = np.random.default_rng(1).standard_normal((WIDTH - 2, 3), np.float32)
    spread = twins.spread(weights)
    np.testing.assert_allclose(rows @ spread, twins.rows @ weights, atol=1e-6)
    np.testing.assert_allclose(np.vdot(spread, spread), np.vdot(weights, weights), rtol=1e-5)
    np.testing.assert_allclose(twins.folded(spread), weights, atol=1e-6)


def test_a_fit_is_the_one_without_groups() -> None:
    rows, labels = with_twins()
    start = Softmax.blank(WIDTH, 3)
    grouped = fit_softmax(sparse(rows), labels, start, strength=5.0, steps=300)
    plain = fit_softmax(rows, labels, start, strength=5.0, steps=300)
    np.testing.assert_allclose(grouped.log_probs(rows), plain.log_probs(rows), atol=2e-2)
    np.testing.assert_array_equal(grouped.weights[1], grouped.weights[4])
