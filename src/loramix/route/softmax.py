"""Multinomial logistic regression on sparse or dense rows, kept as plain arrays."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from loramix.route.ngrams import Floats, Ints, Sparse
from loramix.route.twins import Twins

Rows: TypeAlias = Sparse | Floats


@dataclass(frozen=True, slots=True, eq=False)
class Softmax:
    """log P(class | row) = log_softmax(row @ weights + bias)."""

    weights: Floats  # [D, K]
    bias: Floats  # [K]

    @classmethod
    def blank(cls, width: int, classes: int) -> Softmax:
        """Every class alike."""
        return cls(np.zeros((width, classes), np.float32), np.zeros(classes, np.float32))

    def log_probs(self, rows: Rows) -> Floats:
        """[N, K]"""
        products = rows.dot(self.weights) if isinstance(rows, Sparse) else rows @ self.weights
        return log_softmax(products + self.bias)

    def without(self, classes: Ints) -> Softmax:
        """The same model with some of its classes struck out: where a refit without them starts."""
        kept = np.setdiff1d(np.arange(len(self.bias)), classes)
        return Softmax(self.weights[:, kept], self.bias[kept])

    def with_blank(self, column: int) -> Softmax:
        """The same model with a class put in that says nothing yet."""
        return Softmax(np.insert(self.weights, column, 0, axis=1), np.insert(self.bias, column, 0))


def log_softmax(logits: NDArray[np.floating[Any]]) -> Floats:
    """Over the last axis."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return cast(Floats, shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def fit_softmax(
    rows: Rows, labels: Ints, start: Softmax, *, strength: float, steps: int = 50
) -> Softmax:
    """Minimise strength * (balanced negative log-likelihood) + |weights|^2 / 2.

    Every class weighs the same however many rows it has, so a big data set cannot swamp a small
    one. `start` has a column per class, each of which has a row at least. Deterministic.
    """
    if isinstance(rows, Sparse):
        twins = Twins.of(rows, len(start.weights))
        folded = Softmax(twins.folded(start.weights), start.bias)
        found = _fit(twins.rows, labels, folded, strength, steps)
        return Softmax(twins.spread(found.weights), found.bias)
    return _fit(rows, labels, start, strength, steps)


def _fit(data: Any, labels: Ints, start: Softmax, strength: float, steps: int) -> Softmax:
    """`data` is anything that multiplies by the rows."""
    transposed = data.T if isinstance(data, np.ndarray) else data.T.tocsr()
    balance, at = _balance(labels, strength), np.arange(len(labels))

    def loss(packed: Floats) -> tuple[float, Floats]:
        weights = packed[:-1]
        logits = data @ weights
        logits += packed[-1]
        logits -= logits.max(axis=1, keepdims=True)
        own = logits[at, labels]
        error = np.exp(logits, out=logits)
        total = error.sum(axis=1)
        error *= (balance / total)[:, None]
        error[at, labels] -= balance
        slope = np.empty_like(packed)
        np.add(transposed @ error, weights, out=slope[:-1])
        slope[-1] = error.sum(axis=0)
        nll = float((balance * (np.log(total) - own)).sum(dtype=np.float64))
        return nll + 0.5 * float(np.vdot(weights, weights)), slope

    found = minimise(loss, np.vstack([start.weights, start.bias]), steps)
    return Softmax(found[:-1], found[-1])


def fit_column(
    rows: Rows, labels: Ints, start: Softmax, column: int, *, strength: float, steps: int = 50
) -> Softmax:
    """What `fit_softmax` minimises, over one class; the others' weights stand.

    That is a logistic regression of the class against all others together, whose odds are known.
    """
    balance = _balance(labels, strength)
    target = (labels == column).astype(np.float32)
    data, transposed = _operators(rows, len(start.weights))
    others = start.without(np.array([column]))
    rest = np.logaddexp.reduce(data @ others.weights + others.bias, axis=1)

    def loss(packed: Floats) -> tuple[float, Floats]:
        weights, odds = packed[:-1], data @ packed[:-1] + packed[-1] - rest
        error = balance * (1 / (1 + np.exp(-odds)) - target)
        slope = np.r_[transposed @ error + weights, error.sum(dtype=np.float32)]
        nll = balance * (np.logaddexp(0, odds) - target * odds)
        return float(nll.sum(dtype=np.float64)) + 0.5 * float(np.vdot(weights, weights)), slope

    found = minimise(loss, np.r_[start.weights[:, column], start.bias[column]], steps)
    weights, bias = start.weights.copy(), start.bias.copy()
    weights[:, column], bias[column] = found[:-1], found[-1]
    return Softmax(weights, bias)


def _balance(labels: Ints, strength: float) -> Floats:
    """What each row weighs when every class weighs the same, [N]."""
    counts = np.bincount(labels)
    return (strength * len(labels) / (len(counts) * counts[labels])).astype(np.float32)


def minimise(
    loss: Callable[[Floats], tuple[float, Floats]],
    x: Floats,
    steps: int,
    *,
    memory: int = 4,
    tolerance: float = 1e-5,
) -> Floats:
    """L-BFGS (Liu & Nocedal 1989) in float32, halving steps that do not descend.

    Stops after `steps`, or when two steps in a row gain less than `tolerance` of the loss.
    """
    pairs: deque[tuple[Floats, Floats, float]] = deque(maxlen=memory)
    value, slope = loss(x)
    idle = 0
    for _ in range(steps):
        move = -_curved(slope, pairs)
        descent = float(np.vdot(slope, move))
        size = 1.0 if pairs else min(1.0, 1.0 / max(float(np.abs(slope).sum()), 1e-12))
        after, new_slope = loss(x + np.float32(size) * move)
        while after > value + 1e-4 * size * descent and size > 1e-8:
            size /= 2
            after, new_slope = loss(x + np.float32(size) * move)
        if not after < value:
            break
        step, change = np.float32(size) * move, new_slope - slope
        if (curvature := float(np.vdot(step, change))) > 0:
            pairs.append((step, change, curvature))
        idle = idle + 1 if value - after < tolerance * value else 0
        x, value, slope = x + step, after, new_slope
        if idle == 2:
            break
    return x


def _curved(slope: Floats, pairs: deque[tuple[Floats, Floats, float]]) -> Floats:
    """The slope times the inverse curvature that the last steps showed: the two-loop recursion."""
    direction, shares = slope, []
    for step, change, curvature in reversed(pairs):
        shares.append(np.float32(np.vdot(step, direction) / curvature))
        direction = direction - shares[-1] * change
    if pairs:
        _, change, curvature = pairs[-1]
        direction = direction * np.float32(curvature / np.vdot(change, change))
    for (step, change, curvature), share in zip(pairs, reversed(shares), strict=True):
        direction = direction + (share - np.float32(np.vdot(change, direction) / curvature)) * step
    return direction


def _operators(rows: Rows, width: int) -> tuple[Any, Any]:
    """Something that multiplies by the rows, and by their transpose."""
    if not isinstance(rows, Sparse):
        return rows, rows.T
    from scipy.sparse import csr_matrix

    matrix = csr_matrix((rows.values, rows.columns, rows.starts), shape=(rows.num_rows, width))
    return matrix, matrix.T.tocsr()
