"""Experts over a rounded base, in fewer bits, and optimizers that remember in fewer."""

from __future__ import annotations

import dataclasses
import sys

import pytest
import torch
from torch import nn

from loramix.errors import LoramixError
from loramix.mixed import MixedModel
from loramix.quantized import quantize
from loramix.train.config import Run
from loramix.train.learner import Learner
from loramix.train.loop import Stopped, gradients, train
from tests.rounded import KINDS, WIDE, needs
from tests.tiny import tiny_base
from tests.train.small import SETTINGS, course

LARGE = dataclasses.replace(SETTINGS, rank=128)  # smaller factors bitsandbytes leaves in 32 bits


def found(base, run):
    """The gradients of an expert some way into its training."""
    mixed = MixedModel(base.model)
    learner = Learner(course(base, "x"), mixed)
    generator = torch.Generator().manual_seed(7)
    for weight in learner.weights.values():
        weight.data += 0.05 * torch.randn(weight.shape, generator=generator)
    learner.bind()
    gradients(mixed, [learner], [learner.course.rows], run)
    mixed.release()
    return {name: weight.grad for name, weight in learner.weights.items()}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_over_a_rounded_base_are_those_over_its_rounded_matrices(kind, checkpointing):
    needs(kind)
    base, twin = tiny_base(**WIDE), tiny_base(**WIDE)
    quantize(base.model, kind)
    for name, layer in base.model.named_modules():
        if isinstance(layer, KINDS[kind]):
            plain = twin.model.get_submodule(name)
            plain.weight = nn.Parameter(layer.weight, requires_grad=False)
    run = Run(checkpointing=checkpointing)
    ours, theirs = found(base, run), found(twin, run)
    for name, grad in ours.items():
        torch.testing.assert_close(grad, theirs[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_rounded_base_keeps_no_wide_matrix_for_the_gradient(kind):
    needs(kind)
    base = tiny_base(**WIDE)
    quantize(base.model, kind)
    layer = base.model.model.layers[0].mlp.up_proj
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: sizes.append((t.dtype, t.numel())), lambda t: t
    ):
        layer(torch.randn(1, 3, layer.in_features, requires_grad=True))
    wide = layer.out_features * layer.in_features
    assert all(count < wide for dtype, count in sizes if dtype.is_floating_point)


def test_adamw_in_eight_bits_learns_and_is_taken_up_again_to_the_bit(tmp_path):
    pytest.importorskip("bitsandbytes")
    settings = dataclasses.replace(LARGE, optimizer="adamw8bit", epochs=20)
    seen = []
    (whole,) = train(tiny_base(), [course(tiny_base(), "x", settings=settings)], report=seen.append)
    assert seen[-1].validation < 0.7 * seen[0].loss
    rounds = iter(range(1, 99))
    run = Run(folder=tmp_path, stopped=lambda: next(rounds) == 9)
    with pytest.raises(Stopped):
        train(tiny_base(), [course(tiny_base(), "x", settings=settings)], run)
    again = Run(folder=tmp_path)
    (other,) = train(tiny_base(), [course(tiny_base(), "x", settings=settings)], again)
    assert other.digest == whole.digest


def test_adamw_in_eight_bits_remembers_in_eight_bits():
    pytest.importorskip("bitsandbytes")
    base = tiny_base()
    mixed = MixedModel(base.model)
    learner = Learner(
        course(base, "x", settings=dataclasses.replace(LARGE, optimizer="adamw8bit")), mixed
    )
    gradients(mixed, [learner], [learner.rows()], Run())
    learner.advance()
    states = [learner.optimizer.state[w] for w in learner.weights.values() if w.numel() >= 4096]
    assert states
    assert all(state["state1"].dtype == state["state2"].dtype == torch.uint8 for state in states)


def test_without_bitsandbytes_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(LoramixError, match=r"Four bits need bitsandbytes; .*loramix\[quant\]"):
        quantize(tiny_base(**WIDE).model, "nf4")
    settings = dataclasses.replace(SETTINGS, optimizer="adamw8bit")
    with pytest.raises(LoramixError, match=r"eight bits needs bitsandbytes; .*loramix\[quant\]"):
        train(tiny_base(), [course(tiny_base(), "x", settings=settings)])
