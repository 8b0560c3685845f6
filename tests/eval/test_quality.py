"""Mixes side by side: every row answered once under each mix, scores with intervals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramix.chat import Example
from loramix.engine import Answer
from loramix.errors import BadRequest
from loramix.eval.metrics import METRICS
from loramix.eval.quality import bootstrap, compare
from loramix.mix import Mix

A, BASE = Mix({"a": 1}), Mix({})
EXAMPLES = [Example.of(f"q{n}", "yes") for n in range(20)]


class Parrot:
    """Says "yes" under a mix, and is cut off on the bare base."""

    def __init__(self):
        self.requests = []

    def generate(self, requests):
        self.requests += requests
        return [
            Answer("yes", (1,), "stop", 1) if r.mix else Answer("ye", (1, 2, 3), "length", 1)
            for r in requests
        ]


def compared(contestants, metric="exact", examples=EXAMPLES):
    engine = Parrot()
    return engine, compare(engine, examples, contestants, METRICS[metric], max_tokens=3)


def test_scores_and_gains_are_of_the_same_rows():
    routed = [A, BASE] * 10
    engine, (base, alone, auto) = compared({"base": [BASE] * 20, "a": [A] * 20, "auto": routed})
    assert (base.score.mean, alone.score.mean, auto.score.mean) == (0, 1, 0.5)
    assert (base.truncated, auto.truncated, alone.truncated) == (1, 0.5, 0)
    assert (base.num_tokens, alone.num_tokens) == (3, 1)
    assert alone.gain.mean == alone.gain.low == 1
    assert base.gain.low == base.gain.high == 0
    assert auto.gain.low > 0
    assert auto.hits == (1.0, 0.0) * 10
    assert auto.answers[:2] == ("yes", "ye")
    assert len(engine.requests) == 40  # what auto asks was asked already
    assert {r.sampling.temperature for r in engine.requests} == {0}


def test_nothing_to_compare_is_refused():
    with pytest.raises(BadRequest, match="nothing to compare"):
        compared({})
    with pytest.raises(BadRequest, match="nothing to compare"):
        compared({"a": []}, examples=[])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=50))
def test_an_interval_holds_its_mean_and_nothing_outside_of_the_values(values):
    found = bootstrap(np.array(values))
    assert min(values) - 1e-9 <= found.low <= found.high <= max(values) + 1e-9
    assert found.mean == pytest.approx(np.mean(values))


def test_the_interval_is_the_normal_one_where_rows_are_many():
    values = np.random.default_rng(1).normal(size=2000)
    found = bootstrap(values)
    wide = 1.96 * values.std() / len(values) ** 0.5
    assert found.high - found.low == pytest.approx(2 * wide, rel=0.1)
