"""An expert goes on from an adapter, or is learned over some, as in PEFT's hands."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import warnings

import pytest
import torch

from loramix.adapter import Adapter, Card
from loramix.errors import FormatError, TrainError
from loramix.formats import peft
from loramix.gates import Gates
from loramix.lora import Pair
from loramix.mixed import MixedModel
from loramix.train.batches import IGNORED, collate
from loramix.train.begun import begin
from loramix.train.checkpoint import found
from loramix.train.config import Run, Settings
from loramix.train.learner import Course, Learner, account
from loramix.train.loop import gradients, train
from tests.peft_twin import PROBE
from tests.tiny import random_adapter, tiny_base
from tests.train.small import COLOURS, SETTINGS, rows_of

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from peft import LoraConfig, PeftModel, get_peft_model

PLAIN = dataclasses.replace(
    SETTINGS,
    rank=3,
    alpha=7.0,
    rate=3e-2,
    schedule="constant",
    warmup=0,
    optimizer="sgd",
    max_norm=math.inf,
    keep_best=False,
)
OPTIONS = {"r": 3, "lora_alpha": 7, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def wrapped(model, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(copy.deepcopy(model), LoraConfig(**{**OPTIONS, **options}))


def read_by_peft(model, folder, *, learning=False):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(model, folder, is_trainable=learning)


def shaken(twin, seed=3):
    generator = torch.Generator().manual_seed(seed)
    for weight in twin.parameters():
        if weight.requires_grad:
            weight.data += 0.05 * torch.randn(weight.shape, generator=generator)
    return twin


def saved(base, folder, seed=3, **options):
    """An adapter as PEFT leaves it on disk, and as it is read here."""
    shaken(wrapped(base.model, **options), seed).save_pretrained(folder)
    adapter = peft.read(folder)
    return adapter, peft.scale_of(folder, adapter)


def course_of(base, begun, settings=PLAIN):
    return Course(Card("x"), rows_of(base, COLOURS), (), begun.settings(settings), begun)


def backward(twin, rows):
    batch = collate(rows)
    labels = torch.full_like(batch.ids, IGNORED)
    labels[:, 1:] = batch.labels[:, :-1]
    twin(input_ids=batch.ids, position_ids=batch.positions, labels=labels).loss.backward()


def learned_by_peft(twin, learner):
    """PEFT's steps over the same rows, from the same factors; its logits then."""
    optimizer = torch.optim.SGD(
        [w for w in twin.parameters() if w.requires_grad], lr=PLAIN.rate, momentum=PLAIN.betas[0]
    )
    for step in range(learner.num_steps):
        learner.step = step
        backward(twin, learner.rows())
        optimizer.step()
        optimizer.zero_grad()
    learner.mixed.release()
    return twin.eval()(PROBE).logits.detach()


def logits(base, expert):
    mixed = MixedModel(base.model)
    mixed.bind(expert)
    with torch.no_grad(), mixed.active.using(Gates((expert.name,), torch.ones(1, 1, 1))):
        found = base.model(PROBE).logits
    mixed.release()
    return found


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True, "r": 5}])
def test_an_adapter_is_learned_on_as_peft_does(options, tmp_path):
    base = tiny_base()
    adapter, scale = saved(base, tmp_path / "a", **options)
    course = course_of(base, begin([adapter], [scale], PLAIN, new=False))
    assert course.settings.scale == pytest.approx(scale)
    assert course.settings.rank == options.get("r", 3)
    twin = read_by_peft(copy.deepcopy(base.model), tmp_path / "a", learning=True)
    theirs = learned_by_peft(twin, Learner(course, MixedModel(base.model)))
    (expert,) = train(base, [course])
    assert (theirs - logits(base, adapter)).abs().max() > 0.1
    torch.testing.assert_close(logits(base, expert), theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("new", [False, True])
def test_what_is_learned_over_others_is_the_sum_of_all_over_the_base_as_it_is(new, tmp_path):
    base = tiny_base()
    both = [saved(base, tmp_path / "a", seed=3), saved(base, tmp_path / "b", seed=4, r=2)]
    begun = begin([a for a, _ in both], [s for _, s in both], PLAIN, new=new)
    course = course_of(base, begun)
    lower = copy.deepcopy(base.model)
    for name in ("a", "b") if new else ("a",):
        lower = read_by_peft(lower, tmp_path / name).merge_and_unload()
    learner = Learner(course, MixedModel(base.model))
    if new:
        twin = wrapped(lower)
        for name in learner.start:  # drawn at random in both
            layer = twin.base_model.model.get_submodule(name)
            layer.lora_A["default"].weight.data = learner.weights[f"{name}.a"].detach().clone()
    else:
        twin = read_by_peft(lower, tmp_path / "b", learning=True)
    theirs = learned_by_peft(twin, learner)
    (expert,) = train(base, [course])
    assert expert.rank == (3 + 5 if new else 3 + 2)
    torch.testing.assert_close(logits(base, expert), theirs, rtol=1e-3, atol=1e-3)


def test_layers_that_only_lie_below_are_in_the_expert_and_nothing_of_them_is_learned():
    base = tiny_base()
    lower = random_adapter(base.model, "lower", seed=5)
    settings = dataclasses.replace(PLAIN, targets=("q_proj",))
    (expert,) = train(base, [course_of(base, begin([lower], [1.0], settings, new=True), settings)])
    assert expert.pairs.keys() == lower.pairs.keys()
    for name, pair in lower.pairs.items():
        grown = expert.pairs[name]
        if name.endswith("q_proj"):
            assert grown.rank == 3 + pair.rank
            assert not torch.equal(grown.delta(), pair.delta())
        else:
            torch.testing.assert_close(grown.delta(), pair.delta())


def test_gradients_beside_other_experts_are_those_alone():
    base = tiny_base()
    mixed = MixedModel(base.model)
    lower = random_adapter(base.model, "lower", seed=5)
    fresh = course_of(base, begin([lower], [1.0], PLAIN, new=True))
    again = course_of(base, begin([lower], [2.0], PLAIN, new=False))
    courses = [fresh, dataclasses.replace(again, card=Card("y"))]
    learners = [Learner(course, mixed) for course in courses]
    steps = [list(learner.course.rows) for learner in learners]
    gradients(mixed, learners, steps, Run(checkpointing=True))
    together = [{n: w.grad.clone() for n, w in one.weights.items()} for one in learners]
    for learner, step, grads in zip(learners, steps, together, strict=True):
        learner.optimizer.zero_grad()
        gradients(mixed, [learner], [step], Run())
        for name, weight in learner.weights.items():
            torch.testing.assert_close(grads[name], weight.grad, rtol=1e-5, atol=1e-6)
    mixed.release()


def test_a_checkpoint_knows_what_the_run_began_with(tmp_path):
    base = tiny_base()
    lower = [random_adapter(base.model, "a", seed=seed) for seed in (5, 6)]
    first, other = (course_of(base, begin([one], [1.0], PLAIN, new=True)) for one in lower)
    train(base, [first], Run(folder=tmp_path))
    assert json.loads(account(first, "rows"))["begun_from"] == ["a"]
    with pytest.raises(TrainError, match="of a run with other rows, settings"):
        train(base, [other], Run(folder=tmp_path))
    assert found(tmp_path)


def test_what_cannot_be_learned_over_is_refused(tmp_path):
    base = tiny_base()
    plain, dora = (random_adapter(base.model, "p", dora=dora) for dora in (False, True))
    with pytest.raises(TrainError, match="'p' is a DoRA, which is no sum of factors"):
        begin([dora], [1.0], PLAIN, new=True)
    for wrong in ({"dora": True}, {"start": "pissa"}, {"dropout": 0.1}):
        with pytest.raises(TrainError, match="learned over p must be a plain LoRA"):
            begin([plain], [1.0], dataclasses.replace(PLAIN, **wrong), new=True)
    head = Adapter("h", {"lm_head": Pair(torch.ones(1, 2), torch.ones(3, 1))}, "", Card("h"))
    with pytest.raises(TrainError, match="'h' changes the output layer lm_head"):
        begin([head], [1.0], Settings(), new=False)
    folder = tmp_path / "mixed"
    adapter, _ = saved(base, folder)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    config["alpha_pattern"] = {"q_proj": 14}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(FormatError, match=r"have scales of 2\.33333, 4\.66667; expected one"):
        peft.scale_of(folder, adapter)
