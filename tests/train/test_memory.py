"""What is told of memory before a run begins."""

from __future__ import annotations

import dataclasses

import pytest

from loramix.adapter import Card
from loramix.mixed import MixedModel
from loramix.train.config import Run, Settings
from loramix.train.learner import Course, Learner
from loramix.train.memory import estimate, num_trained
from tests.tiny import tiny_base
from tests.train.small import rows_of


@pytest.mark.parametrize("more", [{}, {"dora": True}, {"targets": ("q_proj",)}])
def test_parameters_are_counted_as_they_are_learned(more):
    base = tiny_base()
    settings = Settings(rank=3, **more)
    learner = Learner(Course(Card("x"), rows_of(base), (), settings), MixedModel(base.model))
    learned = sum(weight.numel() for weight in learner.weights.values())
    learner.mixed.release()
    assert num_trained(base, settings) == learned


def test_an_estimate_grows_with_what_costs_memory():
    base = tiny_base()
    run, settings = Run(micro_tokens=4096), Settings(rank=3)
    least = estimate(base, [settings], run, longest=64)
    assert least.base == sum(p.numel() * 4 for p in base.model.parameters())
    assert least.experts == 16 * num_trained(base, settings)
    assert estimate(base, [settings] * 2, run, 64).experts == 2 * least.experts
    spared = estimate(base, [settings], dataclasses.replace(run, checkpointing=True), 64)
    assert spared.activations < least.activations
    assert "MiB (base" in str(least)
