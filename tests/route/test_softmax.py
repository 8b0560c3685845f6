"""The solver against scikit-learn's, and what the loss promises."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from loramix.route.ngrams import Floats, Ints, Sparse
from loramix.route.softmax import Softmax, fit_softmax, log_softmax


def cloud(sizes: tuple[int, ...], seed: int = 0) -> tuple[Floats, Ints]:
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(sizes)), sizes)
    centres = rng.normal(size=(len(sizes), 6)) * 1.5
    return (centres[labels] + rng.normal(size=(len(labels), 6))).astype(np.float32), labels


@pytest.mark.parametrize("sizes", [(40, 40), (60, 10, 30), (5, 50, 5, 5)])
def test_equals_scikit_learn(sizes: tuple[int, ...]) -> None:
    rows, labels = cloud(sizes)
    ours = fit_softmax(rows, labels, Softmax.blank(6, len(sizes)), strength=0.5, steps=500)
    theirs = LogisticRegression(C=0.5, class_weight="balanced", max_iter=5000, tol=1e-8)
    theirs.fit(rows, labels)
    if len(sizes) > 2:
        expected = theirs.predict_proba(rows)
        np.testing.assert_allclose(np.exp(ours.log_probs(rows)), expected, atol=5e-3)
    agree = ours.log_probs(rows).argmax(1) == theirs.predict(rows)
    assert agree.mean() > 0.98


def test_sparse_and_dense_rows_give_one_model() -> None:
    rows, labels = cloud((20, 20, 20))
    starts, columns = np.arange(0, rows.size + 1, 6), np.tile(np.arange(6), len(rows))
    sparse = Sparse(starts, columns, rows.ravel())
    a = fit_softmax(rows, labels, Softmax.blank(6, 3), strength=1.0, steps=200)
    b = fit_softmax(sparse, labels, Softmax.blank(6, 3), strength=1.0, steps=200)
    np.testing.assert_allclose(a.log_probs(rows), b.log_probs(sparse), atol=2e-2)


def test_balance_makes_repetition_harmless() -> None:
    rows, labels = cloud((20, 20))
    twice = np.concatenate([rows, rows[labels == 0]]), np.concatenate([labels, labels[labels == 0]])
    a = fit_softmax(rows, labels, Softmax.blank(6, 2), strength=1.0, steps=300)
    b = fit_softmax(*twice, Softmax.blank(6, 2), strength=1.0 * 40 / 60, steps=300)
    np.testing.assert_allclose(a.log_probs(rows), b.log_probs(rows), atol=2e-2)


def test_fitting_twice_is_bitwise_equal() -> None:
    rows, labels = cloud((30, 30))
    a, b = (
        fit_softmax(rows, labels, Softmax.blank(6, labels.max() + 1), strength=1.0)
        for _ in range(2)
    )
    assert (a.weights == b.weights).all()


def test_starting_at_the_optimum_stays_there() -> None:
    rows, labels = cloud((30, 30, 30))
    done = fit_softmax(rows, labels, Softmax.blank(6, 3), strength=1.0, steps=500)
    again = fit_softmax(rows, labels, done, strength=1.0, steps=5)
    np.testing.assert_allclose(again.log_probs(rows), done.log_probs(rows), atol=1e-2)


def test_without_strikes_out_classes() -> None:
    rows, labels = cloud((30, 30, 30))
    model = fit_softmax(rows, labels, Softmax.blank(6, labels.max() + 1), strength=1.0)
    less = model.without(np.array([1]))
    expected = log_softmax(model.log_probs(rows)[:, [0, 2]])
    np.testing.assert_allclose(less.log_probs(rows), expected, atol=1e-4)
