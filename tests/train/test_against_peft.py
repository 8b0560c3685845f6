"""What is learned here is what PEFT learns from the same rows, and PEFT reads it so."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import warnings

import pytest
import torch

from loramix.adapter import Card
from loramix.formats import peft
from loramix.mixed import MixedModel
from loramix.train.batches import IGNORED, collate
from loramix.train.config import Run
from loramix.train.learner import Course, Learner
from loramix.train.loop import gradients, train
from tests.peft_twin import PROBE, load_in_peft
from tests.tiny import tiny_base
from tests.train.small import SETTINGS, rows_of

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from peft import LoraConfig, get_peft_model
    from peft.optimizers import create_loraplus_optimizer

# no schedule, no clipping, and plain steps along the gradient: Adam's first ones are its sign alone
PLAIN = dataclasses.replace(
    SETTINGS,
    rank=3,
    alpha=7.0,
    rate=3e-2,
    b_ratio=4.0,
    schedule="constant",
    warmup=0,
    optimizer="sgd",
    max_norm=math.inf,
    keep_best=False,
)
VARIANTS = {
    "lora": ({}, {}),
    "rslora": ({"rslora": True}, {"use_rslora": True}),
    "dora": ({"dora": True}, {"use_dora": True}),
    "pissa": ({"start": "pissa"}, {"init_lora_weights": "pissa"}),
    "olora": ({"start": "olora"}, {"init_lora_weights": "olora"}),
}


def settings_of(variant, **more):
    return dataclasses.replace(PLAIN, **VARIANTS[variant][0], **more)


def twin_of(base, variant, **more):
    """The base in PEFT's hands, with the same settings and its own start."""
    options = {"r": 3, "lora_alpha": 7, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(
            copy.deepcopy(base.model), LoraConfig(**options, **VARIANTS[variant][1], **more)
        )


def pairs_of(twin, learner):
    """PEFT's parameters beside the learner's names for them."""
    for name in learner.start:
        layer = twin.base_model.model.get_submodule(name)
        yield f"{name}.a", layer.lora_A["default"].weight
        yield f"{name}.b", layer.lora_B["default"].weight
        if f"{name}.magnitude" in learner.weights:
            yield f"{name}.magnitude", layer.lora_magnitude_vector["default"].weight


def backward(twin, rows):
    batch = collate(rows)
    labels = torch.full_like(batch.ids, IGNORED)
    labels[:, 1:] = batch.labels[:, :-1]
    loss = twin(input_ids=batch.ids, position_ids=batch.positions, labels=labels).loss
    loss.backward()
    return loss.item()


@pytest.fixture
def learner_of():
    made = []

    def make(base, settings):
        made.append(Learner(Course(Card("x"), rows_of(base), (), settings), MixedModel(base.model)))
        return made[-1]

    yield make
    for learner in made:
        learner.mixed.release()


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_equal_pefts(variant, learner_of):
    base = tiny_base()
    twin = twin_of(base, variant)
    learner = learner_of(base, settings_of(variant))
    moved_alike(twin, learner)
    (loss,) = gradients(learner.mixed, [learner], [learner.course.rows], Run())
    assert loss == pytest.approx(backward(twin, learner.course.rows), rel=1e-5)
    same_gradients(twin, learner)


@pytest.mark.parametrize("variant", ["lora", "rslora", "dora"])
def test_gradients_under_dropout_equal_pefts(variant, learner_of):
    base = tiny_base()
    twin = twin_of(base, variant, lora_dropout=0.4).train()
    learner = learner_of(base, settings_of(variant, dropout=0.4))
    moved_alike(twin, learner)
    rows = sorted(learner.course.rows, key=lambda row: -len(row.ids))  # as a batch has them
    losses = []
    for seed in (1, 2):  # of the masks, a layer's after another's in both
        torch.manual_seed(seed)
        twin.zero_grad()
        losses.append(backward(twin, rows))
        torch.manual_seed(seed)
        for weight in learner.weights.values():
            weight.grad = None
        (loss,) = gradients(learner.mixed, [learner], [rows], Run())
        assert loss == pytest.approx(losses[-1], rel=1e-5)
        same_gradients(twin, learner)
    assert losses[0] != pytest.approx(losses[1], rel=1e-4)


def moved_alike(twin, learner):
    """Both stand where they have learned something."""
    generator = torch.Generator().manual_seed(7)
    for name, theirs in pairs_of(twin, learner):
        weight = learner.weights[name]
        weight.data += 0.05 * torch.randn(weight.shape, generator=generator)
        theirs.data = weight.detach().clone()


def same_gradients(twin, learner):
    for name, theirs in pairs_of(twin, learner):
        torch.testing.assert_close(learner.weights[name].grad, theirs.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_expert_begins_where_peft_does(start, learner_of):
    base = tiny_base()
    twin, plain = twin_of(base, start), base.model(PROBE).logits
    torch.testing.assert_close(twin(PROBE).logits, plain, rtol=1e-4, atol=1e-4)
    learner = learner_of(base, settings_of(start))
    for name, theirs in pairs_of(twin, learner):
        torch.testing.assert_close(learner.weights[name].data, theirs.data, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_finished_expert_is_what_peft_learns_and_peft_reads_it(variant, tmp_path, learner_of):
    base, settings = tiny_base(), settings_of(variant)
    twin = twin_of(base, variant)
    learner = learner_of(base, settings)
    if settings.start == "default":  # drawn at random in both
        for name, theirs in pairs_of(twin, learner):
            theirs.data = learner.weights[name].detach().clone()
    optimizer = create_loraplus_optimizer(
        twin,
        torch.optim.SGD,
        lr=settings.rate,
        loraplus_lr_ratio=settings.b_ratio,
        momentum=settings.betas[0],
    )
    for step in range(learner.num_steps):
        learner.step = step
        backward(twin, learner.rows())
        optimizer.step()
        optimizer.zero_grad()
    learner.mixed.release()
    (expert,) = train(base, [learner.course])
    folder = tmp_path / "x"
    peft.write(expert, folder)
    saved = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert saved["r"] == (6 if settings.start != "default" else 3)
    read, theirs = load_in_peft(base.model, folder), twin.eval()(PROBE).logits.detach()
    assert (theirs - base.model(PROBE).logits).abs().max() > 0.1
    torch.testing.assert_close(read, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_rates_of_loraplus_are_pefts(variant, learner_of):
    base = tiny_base()
    twin = twin_of(base, variant)
    learner = learner_of(base, settings_of(variant, optimizer="adamw", b_ratio=16.0))
    for weight in learner.weights.values():
        weight.grad = torch.zeros_like(weight)
    learner.advance()
    theirs = create_loraplus_optimizer(
        twin, torch.optim.AdamW, lr=PLAIN.rate, loraplus_lr_ratio=16.0
    )
    wanted = rates(theirs)
    found = rates(learner.optimizer)
    for name, parameter in pairs_of(twin, learner):
        assert found[learner.weights[name]] == pytest.approx(wanted[parameter])
    assert len(set(found.values())) == 2


def rates(optimizer):
    return {weight: group["lr"] for group in optimizer.param_groups for weight in group["params"]}
