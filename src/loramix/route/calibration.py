"""When a fitted router leaves queries to the base: stated targets, on rows it has not learned.

Each function gives a new router; its gate, its examples and what it has stored stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from loramix.errors import RouteError, UnknownAdapter
from loramix.route.abstain import (
    SIGNS,
    conformal,
    enough,
    fit_abstain,
    signs,
    with_keep,
    with_recall,
)
from loramix.route.blend import look
from loramix.route.ngrams import Floats
from loramix.route.rows import read

if TYPE_CHECKING:
    from loramix.route.gate import GateRouter


def tuned(
    router: GateRouter, fresh: Mapping[str, Sequence[str]], *, keep: float | None = None
) -> GateRouter:
    """The same gate with the thresholds of some adapters set by queries it has not learned.

    For adapters whose stored examples are not quite what users will ask, or of which another
    share is to stay: `keep` of such queries does (default: as of all). They are not stored, so
    a refit sets thresholds without them. Raises UnknownAdapter, and RouteError for too few
    queries to know that share.
    """
    require_known(router, fresh)
    share, thresholds = share_of("keep", router.keep if keep is None else keep), {}
    for name, queries in fresh.items():
        scores = router.abstain.of_signs(_signs(router, queries))
        if not enough(scores, share):
            raise RouteError(
                f"{len(queries)} queries are too few to keep {share:.1%} of {name!r}'s; "
                f"give at least {math.ceil(1 / (1 - share)) - 1}."
            )
        thresholds[name] = conformal(scores, share)
    return with_thresholds(router, thresholds)


def with_thresholds(router: GateRouter, given: Mapping[str, float]) -> GateRouter:
    """The same gate with the least in-scope score of some adapters. Raises UnknownAdapter."""
    require_known(router, given)
    known = dict(zip(router.adapters, router.abstain.thresholds, strict=True))
    thresholds = tuple((known | dict(given)).values())
    return replace(router, abstain=replace(router.abstain, thresholds=thresholds))


def stays(router: GateRouter, queries: Sequence[str]) -> float:
    """The share of queries that are not left to the base, each taken as one skill."""
    evidence = look(read(queries, router.ngrams, router.encoder), router.gate, router.neighbours)
    winners = evidence.log_probs[:, :-1].argmax(axis=1)
    return float(
        np.mean(router.abstain.scores(evidence) >= np.asarray(router.abstain.thresholds)[winners])
    )


def calibrated(
    router: GateRouter,
    own: Mapping[str, Sequence[str]],
    foreign: Sequence[str] = (),
    *,
    keep: float | None = None,
    oos_recall: float | None = None,
) -> GateRouter:
    """The same gate, leaving queries to the base by a target on rows it has not learned.

    `keep` is the share of `own` that must stay (default: as before); `oos_recall` is the share
    of `foreign` that must go to the base, and replaces it. Foreign queries also teach the
    in-scope score anew. `abstain.coverage` is then the share of `own` that stays. None of the
    rows is stored. Raises UnknownAdapter, and RouteError for targets the rows cannot settle.
    """
    require_known(router, own)
    texts = [text for name in router.adapters for text in own.get(name, ())]
    labels = np.repeat(
        np.arange(len(router.adapters)), [len(own.get(name, ())) for name in router.adapters]
    )
    if not texts or (oos_recall is not None and not foreign):
        raise RouteError("Expected held-out queries, and foreign ones for oos_recall.")
    share = share_of("keep", router.keep if keep is None else keep)
    mine, theirs = _signs(router, texts), _signs(router, foreign)
    abstain = router.abstain
    if len(theirs):
        abstain = fit_abstain(mine, labels, theirs, adapters=len(router.adapters), keep=share)
    scores = abstain.of_signs(mine)
    if oos_recall is None:
        return replace(router, abstain=with_keep(abstain, scores, labels, share))
    recall = share_of("oos_recall", oos_recall)
    found = with_recall(abstain, scores, labels, abstain.of_signs(theirs), recall)
    return replace(router, abstain=found)


def require_known(router: GateRouter, names: Iterable[str]) -> None:
    if unknown := sorted({*names} - {*router.adapters}):
        raise UnknownAdapter(unknown[0], router.adapters)


def _signs(router: GateRouter, texts: Sequence[str]) -> Floats:
    if not texts:
        return np.zeros((0, len(SIGNS)), np.float32)
    return signs(look(read(texts, router.ngrams, router.encoder), router.gate, router.neighbours))


def share_of(name: str, value: float) -> float:
    if not 0 < value < 1:
        raise RouteError(f"{name} is a share between 0 and 1; got {value}.")
    return value
