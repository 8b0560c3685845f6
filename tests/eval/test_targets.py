"""Who answers a row best, measured: every row under every adapter and the base."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramix.chat import Example, Message
from loramix.engine import Request
from loramix.engine.local import LocalEngine
from loramix.eval.targets import FLOOR, Ruler, Targets, oracle_gap, taught
from loramix.mix import Mix
from loramix.route.fixed import FixedRouter
from tests.tiny import random_adapter, tiny_base

EXAMPLES = [Example.of(f"question {n}", f"answer {n % 3}", "a") for n in range(70)]


def as_it_is(turns: Sequence[Message], mix: Mix) -> Sequence[Message]:
    return turns


def guided(turns: Sequence[Message], mix: Mix) -> Sequence[Message]:
    return [Message("system", str(mix)), *turns]


@pytest.mark.parametrize("told", [as_it_is, guided])
def test_targets_are_the_engines_likelihoods_row_by_row(told) -> None:  # type: ignore[no-untyped-def]
    base, done = tiny_base(), []
    adapters = [random_adapter(base.model, name, seed=n) for n, name in enumerate("ab")]
    with LocalEngine(base, adapters) as engine:
        ruler = Ruler(engine, EXAMPLES, told)
        found = ruler.targets(("a", "b"), done.append)
        assert found.nats.shape == (70, 3)
        assert done == [32, 64, 70]
        for n in (0, 33, 69):
            for column, mix in enumerate((Mix({"a": 1}), Mix({"b": 1}), Mix())):
                prompt = tuple(told(EXAMPLES[n].messages[:-1], mix))
                (score,) = engine.score([Request(prompt, mix)], [EXAMPLES[n].answer])
                assert found.nats[n, column] == pytest.approx(-score, abs=1e-3)
        always = ruler.routed(FixedRouter(Mix({"b": 1})), range(70))
        np.testing.assert_array_equal(always, found.nats[:, 1])
        gap = oracle_gap(always, found)
        assert gap.mean == pytest.approx(float((found.nats[:, 1] - found.nats.min(1)).mean()))
        assert gap.mean >= 0
        half = ruler.routed(FixedRouter(Mix({"a": 0.5, "b": 0.5})), range(3))
        assert not np.isin(half, found.nats).any()


@given(st.lists(st.lists(st.floats(0, 500), min_size=3, max_size=3), min_size=1, max_size=9))
def test_a_target_is_the_posterior_over_who_answered(rows: list[list[float]]) -> None:
    found = Targets(("a", "b"), np.array(rows))
    np.testing.assert_allclose(found.shares.sum(1), 1)
    for row, shares, best in zip(rows, found.shares, found.best, strict=True):
        assert best == ("a", "b", "")[int(np.argmin(row))]
        assert shares[np.argmin(row)] == shares.max()
        assert (
            np.log(shares[0] + 1e-300) - np.log(shares[1] + 1e-300)
            == pytest.approx(row[1] - row[0], abs=1e-6)
            or max(row) - min(row) > 30
        )


def test_measured_rows_are_examples_of_all_who_answer_them() -> None:
    nats = np.array([[1.0, 9.0, 9.0], [2.0, 2.1, 9.0], [7.0, 8.0, 1.0]])
    labels = {"a": ["one", "two", "old"], "b": ["three", "more"], "": ["stray"]}
    found = taught(labels, ["one", "two", "three"], Targets(("a", "b"), nats))
    assert found == {"a": ["old", "one", "two"], "b": ["more", "two"], "": ["stray", "three"]}
    assert FLOOR < 0.5
    assert labels["a"] == ["one", "two", "old"]
