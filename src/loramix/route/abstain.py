"""When no adapter fits, the base answers: one in-scope score, and a threshold with a stated target.

No single sign of a foreign query wins everywhere, so six are combined by one logistic regression:
the gate's odds against its background class, the best adapter's own odds, its lead over the second,
the similarity to the nearest stored examples, and how that compares with their likeness among
themselves. It learns from held-out rows of the adapters
against foreign ones: generic background queries (far), and rows of adapters scored by a gate that
was fitted without them (near, and free).

The threshold is split conformal (Vovk et al. 2005): of fresh queries that resemble an adapter's own
rows, a share `keep` stays above it. It needs no out-of-scope data, and is set for each adapter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any, NamedTuple, cast

import numpy as np

from loramix.errors import RouteError
from loramix.route.ngrams import Floats, Ints

NEIGHBOURS = 5
STEADY = 5  # rows below a threshold that make it one adapter's own
SHRUNK = 10.0  # strength of the data, all rows together, where the signs are weighed
UNFITTED = (1.0, 0.0, 0.0, 0.0, 0.0, 0.0)  # weights of the signs when no row could be held out
SIGNS = (
    "odds against the background",
    "odds of the best",
    "lead",
    "nearest",
    "five nearest",
    "nearer than they are to each other",
)


class Evidence(NamedTuple):
    """What the gate saw in each query."""

    log_probs: Floats  # [N, K + 1], the last column is the background class
    nearest: Floats  # [N, NEIGHBOURS] cosines to the closest stored examples, best first
    stands_out: Floats  # [N], how these compare with the examples' likeness among themselves


def background() -> tuple[str, ...]:
    """Generic queries and requests that belong to no adapter; background.txt says where from."""
    text = resources.files("loramix.route").joinpath("background.txt").read_text(encoding="utf-8")
    return tuple(line for line in text.splitlines() if line and not line.startswith("#"))


@dataclass(frozen=True, slots=True)
class Abstain:
    """In-scope score = weights . signs + bias, in log-odds; below its adapter's threshold: none.

    `coverage` is the share of held-out rows above the threshold that those rows gave their adapter.
    """

    weights: tuple[float, ...]
    bias: float
    thresholds: tuple[float, ...]  # [K]
    keep: float
    coverage: float

    def scores(self, evidence: Evidence) -> Floats:
        """Log-odds that a query belongs to any adapter, [N]."""
        return self.of_signs(signs(evidence))

    def of_signs(self, found: Floats) -> Floats:
        weights = np.asarray(self.weights, np.float32)
        return cast(Floats, found @ weights + np.float32(self.bias))


def signs(evidence: Evidence) -> Floats:
    """The features of the in-scope score, [N, len(SIGNS)]; the order is that of SIGNS."""
    adapters = evidence.log_probs[:, :-1]
    inside = np.logaddexp.reduce(adapters, axis=1)
    ranked = np.sort(adapters, axis=1)[:, ::-1]
    lead = ranked[:, 0] - ranked[:, 1] if ranked.shape[1] > 1 else np.zeros(len(ranked))
    best = ranked[:, 0] - np.log(-np.expm1(np.minimum(ranked[:, 0], -1e-6)))
    columns = [
        inside - evidence.log_probs[:, -1],
        best,
        np.minimum(lead, 10),
        evidence.nearest[:, 0],
        evidence.nearest.mean(axis=1),
        evidence.stands_out,
    ]
    return np.stack(columns, axis=1).astype(np.float32)


def fit_abstain(
    own: Floats, labels: Ints, foreign: Floats, *, adapters: int, keep: float
) -> Abstain:
    """Learn the score from the signs of held-out rows (`labels` says whose) and foreign rows."""
    if not len(own) or not len(foreign):
        return Abstain(UNFITTED, 0.0, (0.0,) * adapters, keep, math.nan)
    weights, bias = _logistic(own, foreign)
    plain = Abstain(tuple(weights), bias, (0.0,) * adapters, keep, math.nan)
    return with_keep(plain, plain.of_signs(own), labels, keep)


def with_keep(abstain: Abstain, scores: Floats, labels: Ints, keep: float) -> Abstain:
    """The same score with thresholds for another target, from held-out rows' scores and adapters.

    An adapter with too few rows for a steady quantile of its own gets the one of all rows
    together, and one with too few for any, even odds if that is lower.
    """
    pooled = conformal(scores, keep) if enough(scores, keep) else 0.0

    def threshold(mine: Floats) -> float:
        if enough(mine, keep, below=STEADY):
            return conformal(mine, keep)
        return pooled if enough(mine, keep) else min(pooled, 0.0)

    adapters = range(len(abstain.thresholds))
    thresholds = tuple(threshold(scores[labels == adapter]) for adapter in adapters)
    return replace(
        abstain, thresholds=thresholds, keep=keep, coverage=_covered(scores, labels, thresholds)
    )


def with_recall(
    abstain: Abstain, scores: Floats, labels: Ints, foreign: Floats, recall: float
) -> Abstain:
    """The same score with one threshold that a share `recall` of foreign queries stays below.

    `keep` becomes the share of the adapters' own held-out rows that this leaves to them.
    """
    rank = math.ceil((len(foreign) + 1) * recall)
    if rank > len(foreign):
        raise RouteError(
            f"{len(foreign)} foreign queries are too few to recall {recall:.1%} of them; give at "
            f"least {math.ceil(recall / (1 - recall))}."
        )
    threshold = float(np.nextafter(np.sort(foreign)[rank - 1], np.float32(np.inf)))
    thresholds = (threshold,) * len(abstain.thresholds)
    covered = _covered(scores, labels, thresholds)
    return replace(abstain, thresholds=thresholds, keep=covered, coverage=covered)


def _covered(scores: Floats, labels: Ints, thresholds: Sequence[float]) -> float:
    return float(np.mean(scores >= np.asarray(thresholds)[labels])) if len(labels) else 1.0


def enough(scores: Floats, keep: float, below: int = 1) -> bool:
    """Whether `below` scores or more lie under the threshold that keeps this share of them."""
    return (len(scores) + 1) * (1 - keep) >= below


def conformal(scores: Floats, keep: float) -> float:
    """The largest threshold that a fresh score exceeds with probability at least `keep`.

    >>> conformal(np.arange(1, 100, dtype=np.float32), 0.95)
    5.0
    """
    rank = math.floor((len(scores) + 1) * (1 - keep) + 1e-9)
    return float(np.sort(scores)[rank - 1]) if rank >= 1 else float("-inf")


def _logistic(own: Floats, foreign: Floats) -> tuple[list[float], float]:
    """Weights for the raw signs; both sides weigh the same.

    The signs say much the same, so a free fit plays them off against each other by the accidents of
    a hundred foreign rows. The direction is therefore shrunk hard, and then made log-odds again.
    """
    rows = np.concatenate([own, foreign]).astype(np.float64)
    mean, scale = rows.mean(0), rows.std(0) + 1e-6
    target = np.r_[np.ones(len(own)), np.zeros(len(foreign))]
    direction, _ = _regression((rows - mean) / scale, target, SHRUNK / len(rows))
    weights = direction / scale
    slope, bias = _regression(((rows - mean) @ weights)[:, None], target, 1.0)
    weights = weights * slope
    return weights.tolist(), float(bias - weights @ mean)


def _regression(rows: Any, target: Any, strength: float) -> tuple[Any, float]:
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=strength, class_weight="balanced").fit(rows, target)
    return model.coef_[0], float(model.intercept_[0])
