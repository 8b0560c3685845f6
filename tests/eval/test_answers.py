"""Metrics on words, and answers measured under many mixes at once."""

from __future__ import annotations

import numpy as np
import pytest

from loramix.chat import Example
from loramix.engine import Answer
from loramix.errors import BadRequest
from loramix.eval.answers import AnswerLoss
from loramix.eval.metrics import METRICS, find_metric
from loramix.mix import Mix


@pytest.mark.parametrize(
    ("name", "answer", "reference", "value"),
    [
        ("exact", " yes\n", "yes", 1),
        ("exact", "Yes", "yes", 0),
        ("contains", "It is YES.", "yes", 1),
        ("contains", "no", "yes", 0),
        ("f1", "the cat sat", "The cat", 0.8),
        ("f1", "a a", "a", 2 / 3),
        ("f1", "", "", 1),
        ("f1", "x", "", 0),
    ],
)
def test_metrics(name, answer, reference, value):
    assert METRICS[name](answer, reference) == pytest.approx(value)


def test_a_metric_can_be_ones_own():
    assert find_metric("operator:eq")("a", "a") is True


class Parrot:
    """Says "yes" under mixes of `a` above a half."""

    def __init__(self):
        self.requests = []

    def generate(self, requests):
        self.requests += requests
        texts = ["yes" if r.mix.get("a", 0) > 0.5 else "no" for r in requests]
        return [Answer(text, (1,), "stop", 1) for text in texts]


EXAMPLES = [Example.of("p", "yes"), Example.of("q", "no")]


def test_answers_are_measured_by_row_and_mix_and_never_twice():
    parrot = Parrot()
    loss = AnswerLoss(parrot, ("a", "b"), EXAMPLES, METRICS["exact"], max_tokens=4)
    points = np.array([[1.0, 0.0], [0.2, 1.0]])
    assert loss.losses(points, (0, 1)).tolist() == [[0, 1], [1, 0]]
    assert loss.losses(points, (1,)).tolist() == [[1], [0]]
    assert len(parrot.requests) == 4
    assert {r.mix for r in parrot.requests} == {Mix({"a": 1}), Mix({"a": 0.2, "b": 1})}
    assert all(r.sampling.temperature == 0 for r in parrot.requests)


def test_a_metric_outside_of_its_range_is_refused():
    loss = AnswerLoss(Parrot(), ("a",), EXAMPLES, lambda answer, reference: 2.0, max_tokens=4)
    with pytest.raises(BadRequest, match="0 to 1"):
        loss.losses(np.ones((1, 1)), (0,))
