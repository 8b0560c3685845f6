"""Datasets come together as Hugging Face's datasets interleaves them."""

from __future__ import annotations

from collections import Counter

import pytest

from loramix.errors import TrainError
from loramix.train.interleave import Mixing

PARTS = [list("abcde"), list("12"), list("xyz")]
THEIRS = {
    "interleave_under": "first_exhausted",
    "interleave_over": "all_exhausted",
    "interleave_once": "all_exhausted_without_replacement",
}


def test_behind_each_other():
    assert Mixing()(PARTS) == list("abcde12xyz")


@pytest.mark.parametrize("strategy", THEIRS)
def test_in_strict_turn_the_order_is_that_of_datasets(strategy):
    datasets = pytest.importorskip("datasets")
    parts = [datasets.Dataset.from_dict({"row": part}) for part in PARTS]
    theirs = datasets.interleave_datasets(parts, stopping_strategy=THEIRS[strategy])
    assert Mixing(strategy)(PARTS) == list(theirs["row"])


def test_drawn_by_shares():
    parts = [["a"] * 3000, ["b"] * 3000]
    found = Mixing("interleave_under", (3.0, 1.0), seed=1)(parts)
    counts = Counter(found)
    assert counts["a"] == 3000  # it ends where the first one does
    assert counts["a"] / counts["b"] == pytest.approx(3, rel=0.1)
    assert found == Mixing("interleave_under", (3.0, 1.0), seed=1)(parts)
    assert found != Mixing("interleave_under", (3.0, 1.0), seed=2)(parts)


def test_drawn_by_shares_until_each_was_given_whole():
    over = Counter(Mixing("interleave_over", (0.9, 0.05, 0.05))(PARTS))
    assert set(over) == set("abcde12xyz")
    assert over["a"] > 1
    once = Mixing("interleave_once", (0.9, 0.05, 0.05))(PARTS)
    assert sorted(once) == sorted("abcde12xyz")
    assert [row for row in once if row in "xyz"] == list("xyz")


def test_what_cannot_be_meant_is_refused():
    with pytest.raises(TrainError, match="for a mix_strategy that interleaves"):
        Mixing("concat", (0.5, 0.5))
    with pytest.raises(TrainError, match="expected numbers above 0"):
        Mixing("interleave_over", (1.0, 0.0))
    with pytest.raises(TrainError, match="2 numbers for 3 datasets"):
        Mixing("interleave_over", (1.0, 1.0))(PARTS)
    with pytest.raises(TrainError, match="has no row to learn"):
        Mixing("interleave_over")([["a"], []])
