"""Rates past the warm-up are those of transformers' schedules of the same name and options."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch
from transformers import get_scheduler

from loramix.errors import TrainError
from loramix.train.config import Settings

STEPS, WARMUP, RATE = 40, 5, 1e-3
CASES = {
    "linear": [{}],
    "cosine": [{}, {"num_cycles": 1.5}],
    "cosine_with_restarts": [{}, {"num_cycles": 3}],
    "cosine_with_min_lr": [{"min_lr": 2e-4}, {"min_lr_rate": 0.1, "num_cycles": 1.0}],
    "polynomial": [{}, {"power": 2.0, "lr_end": 1e-5}],
    "inverse_sqrt": [{}, {"timescale": 12}],
    "constant_with_warmup": [{}],
    "warmup_stable_decay": [
        {"num_decay_steps": 10},
        {"num_decay_steps": 7, "num_stable_steps": 20, "decay_type": "linear"},
        {"num_decay_steps": 9, "decay_type": "1-sqrt", "min_lr_ratio": 0.2},
    ],
}


def transformers_rates(name, options):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=RATE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of steps that are given and counted as well
        schedule = get_scheduler(name, optimizer, WARMUP, STEPS, dict(options))
    found = []
    for _ in range(STEPS):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize(("name", "options"), [(n, o) for n, own in CASES.items() for o in own])
def test_a_schedule_is_that_of_transformers(name, options):
    settings = Settings(
        rate=RATE,
        warmup=WARMUP,
        schedule=name.removesuffix("_with_warmup"),
        schedule_options=options,
    )
    ours = [settings.rate_at(step, STEPS) for step in range(STEPS)]
    assert ours[WARMUP:] == pytest.approx(transformers_rates(name, options)[WARMUP:], abs=1e-9)
    assert ours[: WARMUP + 1] == sorted(ours[: WARMUP + 1])


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("linear", {"power": 2}, "lr_scheduler_kwargs has 'power'; the schedule linear takes none"),
        ("cosine", {"num_cycle": 2}, "the schedule cosine takes num_cycles"),
        ("cosine", {"num_cycles": "two"}, "num_cycles of lr_scheduler_kwargs is 'two'; expected"),
        ("cosine", {"num_cycles": -1}, "expected a number >= 0"),
        ("cosine_with_min_lr", {}, "needs one of min_lr and min_lr_rate"),
        ("cosine_with_min_lr", {"min_lr": 1e-5, "min_lr_rate": 0.1}, "needs one of"),
        ("warmup_stable_decay", {}, "needs num_decay_steps"),
        ("warmup_stable_decay", {"num_decay_steps": 1, "decay_type": "x"}, "decay_type is 'x'"),
    ],
)
def test_options_that_a_schedule_does_not_have_are_refused(name, options, expected):
    with pytest.raises(TrainError, match=expected):
        dataclasses.replace(Settings(), schedule=name, schedule_options=options)
