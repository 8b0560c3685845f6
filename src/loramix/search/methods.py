"""Ways to look for a better point; each runs until it has converged or the trials end it.

All begin at the best point that needs no search (`trials.best`), and differ in what they ask of
`Trials`: `losses` of points, a `race` among many, or the `slope` at one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import numpy as np

from loramix.errors import SearchError
from loramix.search import HIGH, LOW
from loramix.search.trials import Trials

Method = Callable[[Trials, np.random.Generator], None]
METHODS: dict[str, Method] = {}

STEP = 0.3  # deviation of a hill climber's step, and of the first generation of CMA-ES
BATCH = 8  # points that optuna suggests before it hears of their losses
FIRST_STEPS = 5  # of BFGS on part of the rows
TOLERANCE = 1e-4  # nats per unit of weight: BFGS has converged


def method(name: str) -> Callable[[Method], Method]:
    def add(function: Method) -> Method:
        METHODS[name] = function
        return function

    return add


@method("hill")
def hill(trials: Trials, rng: np.random.Generator) -> None:
    """Move one weight at a time by a Gaussian step, keep what is no worse: the baseline."""
    point, loss = trials.best, trials.best_loss
    while True:
        moved = point.copy()
        moved[rng.integers(len(point))] += rng.normal(0, STEP)
        moved = moved.clip(LOW, HIGH)
        if (found := float(trials.losses(moved[None])[0])) <= loss:
            point, loss = moved, found


@method("grid")
def grid(trials: Trials, rng: np.random.Generator) -> None:
    """A race among all combinations of evenly spaced weights from 0 to 1, as many as fit."""
    width = trials.num_weights
    left = trials.budget - trials.spent
    levels = 1
    while trials.race_cost((levels + 1) ** width) <= left:
        levels += 1
    if levels < 2:
        raise SearchError(
            f"A grid over {width} weights takes {trials.race_cost(2**width):.0f} trials at least, "
            f"{left:.0f} are left; raise the budget, name fewer adapters, or use another method."
        )
    ladder = np.linspace(0, 1, levels)
    trials.race(np.array(list(itertools.product(ladder, repeat=width))))


@method("gradient")
def gradient(trials: Trials, rng: np.random.Generator) -> None:
    """BFGS with exact gradients, on a few rows first, then on four times as many, up to all.

    What it learned of the curvature goes with it to the next rows; a growing share of them as in
    Byrd et al. 2012 (https://doi.org/10.1007/s10107-012-0572-5). Weights are not confined to LOW
    to HIGH. These are LoRA Soups' (https://arxiv.org/abs/2410.13025), found by second order.
    """
    from scipy.optimize import minimize

    if not hasattr(trials.measure, "gradient"):
        raise SearchError("This objective has no gradient; use objective loss, or another method.")
    point, inverse = trials.best, STEP**2 * np.eye(trials.num_weights)
    for num_rows in trials.rungs[::-2][::-1]:
        last = num_rows == len(trials.rows.fit)
        found = minimize(
            trials.slope,
            point,
            args=(num_rows,),
            jac=True,
            method="BFGS",
            options={
                "gtol": TOLERANCE,
                "maxiter": None if last else FIRST_STEPS,
                "hess_inv0": inverse,
            },
        )
        point, inverse = found.x, (found.hess_inv + found.hess_inv.T) / 2


@method("optuna")
def optuna(trials: Trials, rng: np.random.Generator) -> None:
    """The tree of Parzen estimators (https://papers.nips.cc/paper/4443), BATCH points a race.

    A point that was dropped counts with its loss on the rows that it has seen.
    """
    library = _needed("optuna")
    with _quiet(library):
        sampler = library.samplers.TPESampler(seed=_seed(rng))
        study = library.create_study(sampler=sampler)
    distribution = library.distributions.FloatDistribution(LOW, HIGH)
    ranges = {str(n): distribution for n in range(trials.num_weights)}
    for point, loss in trials.history:
        known = dict(zip(ranges, point.tolist(), strict=True))
        study.add_trial(library.trial.create_trial(params=known, distributions=ranges, value=loss))
    while True:
        asked = [study.ask(ranges) for _ in range(BATCH)]
        points = np.array([[trial.params[name] for name in ranges] for trial in asked])
        losses, _ = trials.race(points)
        for trial, loss in zip(asked, losses.tolist(), strict=True):
            study.tell(trial, loss)


@method("cmaes")
def cmaes(trials: Trials, rng: np.random.Generator) -> None:
    """CMA-ES (https://arxiv.org/abs/1604.00772): a generation is one batch."""
    width = trials.num_weights
    if width < 2:
        raise SearchError("CMA-ES needs two weights at least; use another method for one adapter.")
    bounds = np.tile([LOW, HIGH], (width, 1))
    evolved = _needed("cmaes").CMA(mean=trials.best, sigma=STEP, bounds=bounds, seed=_seed(rng))
    while not evolved.should_stop():
        points = np.array([evolved.ask() for _ in range(evolved.population_size)])
        evolved.tell(list(zip(points, trials.losses(points).tolist(), strict=True)))


def _needed(name: str) -> Any:
    """A library of the extra; SearchError if it is not installed."""
    try:
        return import_module(name)
    except ImportError as error:
        raise SearchError(
            f"This method needs {name}; install it with pip install 'loramix[search]', or use the "
            f"method gradient, hill or grid."
        ) from error


@contextmanager
def _quiet(library: Any) -> Iterator[None]:
    """Without what optuna logs of every study it makes."""
    before = library.logging.get_verbosity()
    library.logging.set_verbosity(library.logging.WARNING)
    try:
        yield
    finally:
        library.logging.set_verbosity(before)


def _seed(rng: np.random.Generator) -> int:
    return int(rng.integers(2**31))
