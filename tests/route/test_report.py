"""A report's figures on verdicts whose answers are known by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from loramix.chat import Message
from loramix.errors import BadRequest
from loramix.mix import Mix
from loramix.route import Decision
from loramix.route.page import page
from loramix.route.report import NONE, Figure, Row, Verdict, auroc, difference, judge, report
from tests.route.small import fitted, held_out


def row(text: str, *routes: str) -> Row:
    return Row((Message("user", text),), frozenset(routes))


def verdict(mix: str, *routes: str, text: str = "q", **scores: float) -> Verdict:
    none = 1 - sum(scores.values())
    return Verdict(row(text, *routes), Decision(Mix.parse(mix), scores, none, (), 1.0), 2.0)


MADE = [
    verdict("a", "a", a=0.9, b=0.1),
    verdict("b", "a", text="mine", a=0.3, b=0.6),
    verdict("a:0.6+b:0.4", "b", text="his", a=0.6, b=0.3),
    verdict("base", a=0.1, b=0.1),
    verdict("a", a=0.5, b=0.1),
    verdict("base", "b", a=0.1, b=0.2),
    verdict("a:0.6+b:0.4", "a", "b", a=0.5, b=0.5),
    verdict("a", "a", "b", a=0.8, b=0.1),
]


def test_figures_are_those_counted_by_hand() -> None:
    found = report(MADE)
    assert (found.accuracy.value, found.accuracy.n) == (3 / 8, 8)
    assert found.in_scope.value == 1 / 4
    assert found.none_recall.value == 1 / 2
    assert found.none_precision.value == 1 / 2
    assert found.false_second.value == 1 / 4
    assert (found.mix_exact.value, found.mix_first.value) == (1 / 2, 1)
    assert found.routes["a"] == (1 / 3, 1 / 2, 2 / 5, 2)
    assert found.routes[NONE] == (1 / 2, 1 / 2, 1 / 2, 2)
    assert found.confusion["a"] == {"a": 1, "b": 1}
    assert ("a", "b", ("mine",)) in found.confused
    assert found.coverage[-1] == (1.0, 0.5)  # of the best score, whoever answered
    assert found.p50_ms == 2.0


def test_calibration_error_is_the_gap_weighed_by_rows() -> None:
    honest = [verdict("a", "a" if i < 6 else "b", a=0.6, b=0.4) for i in range(10)]
    assert report(honest).calibration_error == pytest.approx(0)
    boastful = [verdict("a", "b", a=0.9, b=0.1)] * 5
    assert report(boastful).calibration_error == pytest.approx(0.9)


def test_what_no_row_has_a_say_in_is_not_a_number() -> None:
    found = report([verdict("base", a=0.2)])
    assert math.isnan(found.in_scope.value)
    assert math.isnan(found.none_auroc)
    assert math.isnan(found.calibration_error)
    assert "nan" not in page(found, "t").replace("nance", "")


@given(high=st.lists(st.integers(0, 5), min_size=1), low=st.lists(st.integers(0, 5), min_size=1))
def test_auroc_is_scikit_learns(high: list[int], low: list[int]) -> None:
    truth = [1] * len(high) + [0] * len(low)
    assert auroc(high, low) == pytest.approx(roc_auc_score(truth, high + low))


def test_an_interval_holds_the_mean_and_narrows() -> None:
    few, many = Figure.of([True, False] * 10), Figure.of([True, False] * 1000)
    for figure in (few, many):
        assert figure.low < figure.value < figure.high
    assert many.high - many.low < (few.high - few.low) / 5


def test_a_difference_resamples_rows_together() -> None:
    same = difference(MADE, MADE)
    assert (same.value, same.low, same.high) == (0, 0, 0)
    better = [verdict("a", "a", a=0.9)] * 4
    worse = [verdict("b", "a", a=0.9)] * 4
    assert difference(worse, better).value == 1


def test_a_router_is_judged_row_by_row() -> None:
    router = fitted()
    rows = [row(text, name) for name, texts in held_out().items() for text in texts]
    rows.append(row("who wrote the first novel ever printed"))
    found = report(judge(router, rows))
    assert found.in_scope.value > 0.9
    assert found.none_recall.value == 1
    assert sum(n for each in found.confusion.values() for n in each.values()) == len(rows)
    assert np.mean([each.recall for each in found.routes.values()]) > 0.9


def test_rows_it_cannot_be_judged_on_are_refused() -> None:
    router = fitted()
    with pytest.raises(BadRequest, match="No rows"):
        judge(router, [])
    with pytest.raises(BadRequest, match="cannot choose"):
        judge(router, [row("hello", "nobody")])


def test_the_page_holds_its_plots_and_escapes_queries() -> None:
    made = [*MADE, verdict("b", "a", text="<script>alert(1)</script>", a=0.3, b=0.6)]
    html = page(report(made), "Mine & yours")
    assert html.count("<svg") == 2
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
    assert "Mine &amp; yours" in html
