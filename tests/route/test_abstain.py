"""The threshold keeps what it states; the score tells foreign queries from own ones."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loramix.route.abstain import (
    SIGNS,
    Evidence,
    background,
    conformal,
    fit_abstain,
    signs,
    with_keep,
)
from loramix.route.softmax import log_softmax


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 300), st.floats(0.5, 0.99), st.integers(0, 10_000))
def test_conformal_leaves_out_at_most_its_share(count: int, keep: float, seed: int) -> None:
    scores = np.random.default_rng(seed).normal(size=count).astype(np.float32)
    below = (scores < conformal(scores, keep)).sum()
    assert below <= (count + 1) * (1 - keep)


def test_fresh_rows_are_kept_as_stated() -> None:
    rng = np.random.default_rng(0)
    kept = []
    for _ in range(300):
        threshold = conformal(rng.normal(size=200).astype(np.float32), 0.9)
        kept.append((rng.normal(size=200) >= threshold).mean())
    assert np.mean(kept) == pytest.approx(0.9, abs=0.01)


def world(seed: int = 0, count: int = 400) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count)
    own = rng.normal(1.0, 1, (count, len(SIGNS))).astype(np.float32)
    own[labels == 1] += 1
    return own, labels, rng.normal(-1.5, 1, (count, len(SIGNS))).astype(np.float32)


@pytest.mark.parametrize("keep", [0.8, 0.9, 0.95])
def test_every_adapter_keeps_its_share(keep: float) -> None:
    abstain = fit_abstain(*world(), adapters=2, keep=keep)
    own, labels, foreign = world(seed=1)
    scores = abstain.of_signs(own)
    for adapter in (0, 1):
        mine = scores[labels == adapter]
        assert (mine >= abstain.thresholds[adapter]).mean() == pytest.approx(keep, abs=0.06)
    assert abstain.coverage == pytest.approx(keep, abs=0.01)
    assert (abstain.of_signs(foreign) < min(abstain.thresholds)).mean() > 0.95


def test_few_rows_share_one_threshold() -> None:
    own, labels, foreign = world()
    labels[:] = 0
    labels[:3] = 1
    abstain = fit_abstain(own, labels, foreign, adapters=2, keep=0.9)
    assert abstain.thresholds[1] == min(conformal(abstain.of_signs(own), 0.9), 0)


def test_nothing_held_out_means_even_odds_and_says_so() -> None:
    none = np.zeros((0, len(SIGNS)), np.float32)
    abstain = fit_abstain(none, np.zeros(0, np.int64), none, adapters=2, keep=0.9)
    assert abstain.thresholds == (0.0, 0.0)
    assert math.isnan(abstain.coverage)


def test_another_target_moves_thresholds_only() -> None:
    own, labels, foreign = world()
    loose = fit_abstain(own, labels, foreign, adapters=2, keep=0.95)
    strict = with_keep(loose, loose.of_signs(own), labels, 0.8)
    assert strict.weights == loose.weights
    assert all(s > t for s, t in zip(strict.thresholds, loose.thresholds, strict=True))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 6), st.integers(0, 1000))
def test_signs_are_finite_for_any_number_of_adapters(adapters: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    log_probs = log_softmax(rng.normal(scale=30, size=(7, adapters + 1)).astype(np.float32))
    near = rng.random((7, 5), np.float32)
    found = signs(Evidence(log_probs, near, rng.random(7, np.float32)))
    assert found.shape == (7, len(SIGNS))
    assert np.isfinite(found).all()


def test_the_packaged_background_is_clean() -> None:
    texts = background()
    assert len(texts) > 2000
    assert len(set(texts)) == len(texts)
    assert not any(text.startswith("#") or text != text.strip() for text in texts)
