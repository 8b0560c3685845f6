"""Methods against the budget, on a bowl whose bottom is known; what is reported about it."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramix.errors import SearchError
from loramix.search.find import find, starting_points
from loramix.search.methods import METHODS
from loramix.search.trials import CHOOSE, HELD_OUT, Spent, Trials, split
from tests.search.bowl import BEST, Bowl

NEAR = {"gradient": 0.03, "cmaes": 0.1, "hill": 0.15, "optuna": 0.5, "grid": 0.4}


def keys(bowl):
    return range(len(bowl.sizes))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_finds_the_bottom_within_its_budget(method):
    bowl = Bowl()
    found = find(bowl, keys(bowl), method=method, budget=100)
    assert np.abs(np.array(found.point) - BEST).max() < NEAR[method]
    assert found.gain.is_proven
    assert found.gain.mean == pytest.approx(found.start_loss - found.loss)
    assert found.trials <= 101  # a last look at the rows to choose by
    fit, _, held = found.num_rows
    assert bowl.num_looks == pytest.approx(found.trials * fit + 3 * held)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_result(method):
    first, again, other = (
        replace(find(Bowl(), keys(Bowl()), method=method, budget=40, seed=seed), seconds=0)
        for seed in (3, 3, 4)
    )
    assert first == again
    assert first != other


def test_where_nothing_is_to_gain_it_says_so():
    bowl = Bowl(best=np.array([1.0, 0.0, 0.0]), noise=0.3)
    found = find(bowl, keys(bowl), method="gradient")
    assert found.start == "a"
    assert found.start_loss < found.base_loss
    assert not found.gain.is_proven


def test_an_interrupt_keeps_the_best_so_far():
    class Interrupted(Bowl):
        def losses(self, points, rows):
            if 500 < self.num_looks < 2000:
                self.num_looks = 2000
                raise KeyboardInterrupt
            return super().losses(points, rows)

    found = find(Interrupted(), keys(Bowl()), method="hill", budget=1000)
    assert found.ended == "interrupted"
    assert found.loss < found.start_loss


def test_what_is_learned_by_heart_ends_early():
    class Memorised(Bowl):
        """Rows to choose by want the opposite of the rows to fit."""

        def losses(self, points, rows):
            sign = np.where(np.isin(rows, list(rows_of.choose)), -1, 1)
            return super().losses(points, rows) * sign

    rng = np.random.default_rng(0)
    rows_of = split(range(40), rng)
    found = find(Memorised(), keys(Bowl()), method="hill", budget=1000)
    assert found.ended == "early"
    assert found.trials < 900


def test_weights_that_break_the_model_lose():
    class Broken(Bowl):
        def losses(self, points, rows):
            found = super().losses(points, rows)
            found[points[:, 0] > 0.9] = np.nan
            return found

    found = find(Broken(), keys(Bowl()), method="hill", budget=100)
    assert found.point[0] <= 0.9
    assert np.isfinite(found.gain.mean)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"method": "magic"}, "gradient"),
        ({"budget": 1}, "starts"),
        ({"method": "grid", "budget": 4}, "grid over 3 weights"),
    ],
)
def test_what_cannot_work_is_refused(change, says):
    with pytest.raises(SearchError, match=says):
        find(Bowl(), keys(Bowl()), **change)


def test_few_rows_are_refused():
    with pytest.raises(SearchError, match="at least 10"):
        find(Bowl(30), [n % 9 for n in range(30)])


def test_a_measure_without_gradients_is_refused():
    class Rough:
        owners, sizes, losses = Bowl().owners, Bowl().sizes, Bowl().losses

    with pytest.raises(SearchError, match="no gradient"):
        find(Rough(), keys(Bowl()))


@pytest.mark.parametrize(("method", "library"), [("optuna", "optuna"), ("cmaes", "cmaes")])
def test_a_missing_library_is_named(method, library, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(SearchError, match=r"needs .* install 'loramix\[search\]'"):
        find(Bowl(), keys(Bowl()), method=method)


def test_one_adapter_has_no_average_and_no_cmaes():
    assert list(starting_points(["a"])) == ["base", "a"]
    with pytest.raises(SearchError, match="two weights"):
        find(Bowl(best=np.array([0.5])), keys(Bowl()), method="cmaes")


@given(st.lists(st.integers(0, 30), min_size=60, max_size=90), st.integers(0, 99))
def test_a_split_is_whole_and_keeps_equal_prompts_together(prompts, seed):
    if len(set(prompts)) < 10:
        return
    rows = split(prompts, np.random.default_rng(seed))
    parts = (rows.fit, rows.choose, rows.held)
    assert sorted(row for part in parts for row in part) == list(range(len(prompts)))
    assert len({prompts[row] for part in parts for row in part}) == sum(
        len({prompts[row] for row in part}) for part in parts
    )
    shares = [len({prompts[row] for row in part}) / len(set(prompts)) for part in parts]
    assert shares[1:] == pytest.approx([CHOOSE, HELD_OUT], abs=0.06)


@given(st.integers(1, 40), st.integers(10, 200), st.integers(0, 9))
def test_a_race_costs_what_it_says_and_finds_the_best_of_clear_cases(num_points, num_rows, seed):
    bowl = Bowl(num_rows, noise=0.0)
    trials = Trials(bowl, split(range(num_rows), np.random.default_rng(seed)), budget=1e6)
    points = np.random.default_rng(seed).uniform(-1, 2, (num_points, 3))
    points[num_points // 2] = BEST
    before = trials.race_cost(num_points)
    means, whole = trials.race(points)
    assert means.argmin() == num_points // 2
    assert num_points // 2 in whole
    looked = len(trials.rows.choose) / len(trials.rows.fit)
    assert trials.spent == pytest.approx(before + looked)
    assert before <= num_points


def test_no_row_is_looked_at_beyond_the_budget():
    bowl = Bowl()
    trials = Trials(bowl, split(keys(bowl), np.random.default_rng(0)), budget=2)
    trials.losses(np.zeros((1, 3)))
    with pytest.raises(Spent):
        trials.losses(np.zeros((2, 3)))
    assert trials.spent < 2
