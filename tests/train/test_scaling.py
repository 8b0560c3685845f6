"""A base in float16 is trained over as one in float32, and what 16 bits cannot hold is redone."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from loramix.mixed import MixedModel
from loramix.train.checkpoint import found
from loramix.train.config import Run
from loramix.train.learner import Learner
from loramix.train.loop import Stopped, gradients, train
from loramix.train.scaling import FIRST, HELD_STEPS, LossScale
from tests.tiny import tiny_base
from tests.train.small import COLOURS, SETTINGS, SOUNDS, course


def halved():
    """A base of random weights in float16, and the same ones in float32."""
    base, wide = tiny_base(), tiny_base()
    base.model.half()
    wide.model.half().float()
    return base, wide


def gradients_of(base, scale=None):
    mixed = MixedModel(base.model)
    learner = Learner(course(base, "x"), mixed)
    generator = torch.Generator().manual_seed(7)
    for weight in learner.weights.values():
        weight.data += 0.05 * torch.randn(weight.shape, generator=generator)
    learner.bind()
    learner.loss_scale = LossScale(scale) if scale else learner.loss_scale
    gradients(mixed, [learner], [learner.rows()], Run())
    lost = learner.gradient_is_lost()
    learner.loss_scale.undo(learner.weights.values())
    mixed.release()
    return {name: weight.grad for name, weight in learner.weights.items()}, lost


def test_gradients_are_those_of_float32_and_scaling_keeps_small_ones():
    half, wide = halved()
    (scaled, _), (plain, _), (exact, _) = (
        gradients_of(half),
        gradients_of(half, 1.0),
        gradients_of(wide),
    )
    for name, gradient in exact.items():
        assert scaled[name].dtype == torch.float32
        torch.testing.assert_close(scaled[name], gradient, rtol=0.05, atol=2e-3)
    off = [sum((g - exact[n]).norm() for n, g in each.items()) for each in (scaled, plain)]
    assert off[0] < off[1]


def test_an_overflow_is_taken_anew_and_loses_no_step_and_touches_no_other_expert(monkeypatch):
    half, _ = halved()
    alone, together = [], []
    train(half, [course(half, "calm", SOUNDS)], report=alone.append)
    assert gradients_of(half, 2.0**40) == (dict.fromkeys(gradients_of(half)[0]), True)
    high = classmethod(lambda cls, dtype: cls(2.0**30))  # for both: too much at first
    monkeypatch.setattr(LossScale, "of", high)
    train(half, [course(half, "a"), course(half, "calm", SOUNDS)], report=together.append)
    own = [p for p in together if p.name == "calm"]
    assert [p.step for p in own] == [p.step for p in alone]
    for mine, yours in zip(own, alone, strict=True):
        assert mine.loss == pytest.approx(yours.loss, rel=0.02)


def test_the_scale_grows_after_steps_that_held_and_only_in_16_bits():
    scale = LossScale.of(torch.float16)
    for _ in range(HELD_STEPS):
        scale.undo([])
    assert (scale.value, scale.num_held) == (2 * FIRST, 0)
    assert LossScale.of(torch.bfloat16) == LossScale.of(torch.float32) == LossScale(1.0)
    lost = torch.zeros(1)
    lost.grad = torch.full((1,), torch.nan)
    assert not LossScale(1.0).lowered([lost])  # there it is an error, and no lack of range


def test_a_run_in_16_bits_goes_on_to_the_bit(tmp_path):
    half, _ = halved()
    courses = [course(half, "a", COLOURS, dataclasses.replace(SETTINGS, epochs=5))]
    (whole,) = train(half, courses)
    rounds = iter(range(1, 99))
    with pytest.raises(Stopped):
        train(half, courses, Run(folder=tmp_path, stopped=lambda: next(rounds) == 4))
    assert '"num_held": 4' in (found(tmp_path)[-1] / "state.json").read_text(encoding="utf-8")
    (again,) = train(half, courses, Run(folder=tmp_path))
    assert again.digest == whole.digest
