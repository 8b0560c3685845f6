"""Experts learned together are the experts learned alone."""

import dataclasses
import math

import pytest
import torch

from loramix.adapter import Adapter, Card
from loramix.errors import TrainError
from loramix.formats import peft
from loramix.gates import Gates
from loramix.mixed import MixedModel
from loramix.train.batches import collate
from loramix.train.config import Run, Settings
from loramix.train.forward import losses, rounded_products
from loramix.train.learner import Course, Learner
from loramix.train.loop import gradients, train, validated
from loramix.train.start import fresh_pairs
from tests.tiny import ARCHITECTURES, tiny_base
from tests.train.small import COLOURS, SETTINGS, SOUNDS, course

VARIANTS = {
    "plain": {},
    "rslora": {"rslora": True, "alpha": 3.0},
    "dora": {"dora": True},
    "pissa": {"start": "pissa"},
    "olora": {"start": "olora"},
    "narrow": {"targets": ("q_proj", "down_proj"), "rank": 7},
}


def change(**values):
    return dataclasses.replace(SETTINGS, **values)


def shaken(learner):
    """Factors as they are some way into the training: b is no longer zero."""
    generator = torch.Generator().manual_seed(7)
    for weight in learner.weights.values():
        weight.data += 0.05 * torch.randn(weight.shape, generator=generator)
    learner.bind()
    return learner


def test_an_expert_learns_its_rows_and_the_base_is_given_back():
    base, seen = tiny_base(), []
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    one = course(base, "colours", settings=change(rate=3e-2, epochs=30))
    (expert,) = train(base, [one], report=seen.append)
    assert seen[-1].validation < seen[0].loss / 3  # the frozen output layer bounds it from below
    after = base.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert expert.digest == peft.digest(expert.pairs)
    best = min(p.validation for p in seen if p.validation is not None)
    assert served_loss(base, expert, one.validation) == pytest.approx(best, rel=1e-5)


def served_loss(base, expert, rows):
    """Nats per answer token under the finished adapter, as the engine would apply it."""
    mixed = MixedModel(base.model)
    mixed.bind(expert)
    total = 0.0
    with torch.no_grad(), mixed.active.using(Gates((expert.name,), torch.ones(1, 1, 1))):
        for row in rows:
            total += losses(mixed, collate([row]))[0].item()
    mixed.release()
    return total / sum(row.num_learned for row in rows)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_fresh_expert_is_the_base_and_a_finished_one_is_served_as_it_was_learned(variant):
    base, seen = tiny_base(), []
    settings = change(epochs=2, **VARIANTS[variant])
    one = course(base, "x", settings=settings)
    bare = served_loss(base, Adapter("x", {}, "", Card("x")), one.validation)
    mixed = MixedModel(base.model)
    assert validated(mixed, Learner(one, mixed), Run()).loss == pytest.approx(bare, rel=1e-5)
    mixed.release()
    (expert,) = train(base, [one], report=seen.append)
    best = min(p.validation for p in seen if p.validation is not None)
    assert best < bare
    assert served_loss(base, expert, one.validation) == pytest.approx(best, rel=1e-5)
    doubled = settings.start != "default"
    assert expert.rank == settings.rank * (2 if doubled else 1)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_one_pass_equal_those_of_each_expert_alone(checkpointing, packing):
    base = tiny_base()
    mixed = MixedModel(base.model)
    learners = [
        shaken(Learner(course(base, name, pairs, change(**VARIANTS[name])), mixed))
        for name, pairs in zip(VARIANTS, (COLOURS, SOUNDS) * 3, strict=True)
    ]
    steps = [list(learner.course.rows) for learner in learners]
    run = Run(checkpointing=checkpointing, packing=packing, micro_tokens=300)
    together = gradients(mixed, learners, steps, run)
    found = [{n: w.grad.clone() for n, w in one.weights.items()} for one in learners]
    for learner, step, loss, grads in zip(learners, steps, together, found, strict=True):
        learner.optimizer.zero_grad()
        alone = gradients(mixed, [learner], [step], Run(micro_tokens=10_000))
        assert alone[0] == pytest.approx(loss, rel=1e-5)
        for name, weight in learner.weights.items():
            torch.testing.assert_close(grads[name], weight.grad, rtol=1e-5, atol=1e-6)
    mixed.release()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_learns_several_experts_at_once(architecture):
    base = tiny_base(architecture)
    both = [course(base, "a", COLOURS), course(base, "b", SOUNDS)]
    mixed = MixedModel(base.model)
    learners = [shaken(Learner(one, mixed)) for one in both]
    steps = [learner.rows() for learner in learners]
    gradients(mixed, learners, steps, Run())
    found = [{n: w.grad.clone() for n, w in one.weights.items()} for one in learners]
    for learner, step, grads in zip(learners, steps, found, strict=True):
        learner.optimizer.zero_grad()
        gradients(mixed, [learner], [step], Run(checkpointing=True))
        for name, weight in learner.weights.items():
            torch.testing.assert_close(grads[name], weight.grad, rtol=1e-5, atol=1e-6)
    mixed.release()


def test_adding_an_expert_does_not_change_another():
    base = tiny_base()
    first = course(base, "first", COLOURS, change(epochs=6))
    others = [
        course(base, "second", SOUNDS, change(rank=9, epochs=2, seed=3)),
        course(base, "third", SOUNDS, change(targets=("q_proj",), rate=3e-2)),
    ]
    alone, together = [], []
    (one,) = train(base, [first], report=alone.append)
    three = train(base, [*others, first], report=together.append)
    own = [p for p in together if p.name == "first"]
    assert [p.step for p in own] == [p.step for p in alone] == list(range(1, 13))
    for mine, yours in zip(alone, own, strict=True):
        assert mine.loss == pytest.approx(yours.loss, abs=1e-4)
        if mine.validation is not None:
            assert mine.validation == pytest.approx(yours.validation, abs=1e-4)
    for layer, pair in one.pairs.items():
        torch.testing.assert_close(pair.b, three[2].pairs[layer].b, rtol=1e-3, atol=1e-5)


def test_the_same_seed_learns_the_same_expert():
    experts = [train(base, [course(base, "x")])[0] for base in (tiny_base(), tiny_base())]
    for layer, pair in experts[0].pairs.items():
        assert torch.equal(pair.b, experts[1].pairs[layer].b)


def test_rows_that_are_not_shuffled_are_learned_in_their_order():
    base = tiny_base()
    mixed = MixedModel(base.model)
    learner = Learner(course(base, "x", SOUNDS, change(shuffled=False)), mixed)
    seen = []
    for step in range(6):
        learner.step = step
        seen += learner.rows()
    mixed.release()
    assert seen == [*learner.course.rows] * 2


def test_ten_bits_are_for_gpus_that_have_them(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with rounded_products(wanted=False):
        pass
    with pytest.raises(TrainError, match="tf32 needs an NVIDIA GPU since Ampere, and there"):
        rounded_products(wanted=True).__enter__()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    before = torch.get_float32_matmul_precision()
    with rounded_products(wanted=True):
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == before


def test_accuracy_is_the_mean_of_the_rows_shares_of_likeliest_tokens_and_may_decide():
    base, seen = tiny_base(), []
    one = course(base, "x", settings=change(rate=3e-2, epochs=12, best_by="accuracy"))
    (expert,) = train(base, [one], report=seen.append)
    found = [p.accuracy for p in seen if p.accuracy is not None]
    assert found[0] < max(found)
    mixed = MixedModel(base.model)
    mixed.bind(expert)
    shares = []
    with torch.no_grad(), mixed.active.using(Gates((expert.name,), torch.ones(1, 1, 1))):
        for row in one.validation:
            chosen = base.model(torch.tensor([row.ids])).logits[0].argmax(1).tolist()
            hits = [chosen[t - 1] == row.ids[t] for a, b in row.learned for t in range(a, b)]
            shares.append(sum(hits) / len(hits))
    mixed.release()
    assert sum(shares) / len(shares) == pytest.approx(max(found))


def test_dropout_hangs_on_the_seed_alone():
    settings = change(dropout=0.4)
    first, again = [], []
    for told in (first, again):
        base = tiny_base()
        train(base, [course(base, "x", settings=settings)], report=told.append)
        torch.manual_seed(99)  # of the program around it
    assert [p.loss for p in first] == [p.loss for p in again]


def test_dropout_changes_gradients_and_no_figure():
    def measured(dropout):
        base = tiny_base()
        mixed = MixedModel(base.model)
        learner = shaken(Learner(course(base, "x", settings=change(dropout=dropout)), mixed))
        loss = validated(mixed, learner, Run()).loss
        gradients(mixed, [learner], [learner.rows()], Run())
        mixed.release()
        return loss, [weight.grad for weight in learner.weights.values()]

    (loss, plain), (same, dropped) = measured(0.0), measured(0.4)
    assert loss == same
    assert not any(torch.equal(a, b) for a, b in zip(plain, dropped, strict=True))


def test_an_expert_that_gets_no_better_stops_and_leaves_its_rows_to_the_others():
    base, seen = tiny_base(), []
    idle = change(rate=1e-30, epochs=40, patience=2)  # too little to move any loss
    calm = course(base, "calm", settings=change(epochs=10))
    train(base, [course(base, "idle", settings=idle), calm], report=seen.append)
    steps = {p.name: p.step for p in seen}
    assert steps["idle"] == 6  # an epoch of two steps is the best, and two more are no better
    assert steps["calm"] == 20


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a != "opt"])
def test_packed_rows_do_not_see_each_other(architecture):
    base = tiny_base(architecture)
    mixed = MixedModel(base.model)
    learner = shaken(Learner(course(base, "x", SOUNDS), mixed))
    apart = gradients(mixed, [learner], [learner.course.rows], Run())
    found = {name: weight.grad.clone() for name, weight in learner.weights.items()}
    learner.optimizer.zero_grad()
    packed = gradients(mixed, [learner], [learner.course.rows], Run(packing=True))
    assert packed[0] == pytest.approx(apart[0], rel=1e-6)
    for name, weight in learner.weights.items():
        torch.testing.assert_close(found[name], weight.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packing_is_refused_where_rows_would_see_each_other(architecture):
    base = tiny_base(architecture)
    one = course(base, "x", settings=change(max_steps=1))
    if architecture == "opt":
        with pytest.raises(TrainError, match="see each other in OPTForCausalLM"):
            train(base, [one], Run(packing=True))
    else:
        train(base, [one], Run(packing=True))


def test_pairs_lie_where_the_base_does_so_that_layers_learn_them_and_no_copy():
    model = tiny_base().model.to("meta")
    pair = fresh_pairs(model, ("q_proj",), 2)["model.layers.0.self_attn.q_proj"]
    assert (pair.a.device.type, pair.b.device.type) == ("meta", "meta")


@pytest.mark.parametrize("target", ["query", "proj", "lm_head"])
def test_a_target_that_names_no_layer_is_refused(target):
    with pytest.raises(TrainError, match=f"'{target}'; expected all-linear or some of down_proj"):
        fresh_pairs(tiny_base().model, ("q_proj", target), 2)


@pytest.mark.parametrize(
    "wrong",
    [
        *({"rank": 0}, {"rate": -1}, {"epochs": 0}, {"epochs": math.nan}, {"batch_size": 0}),
        *({"dropout": 1.0}, {"warmup": -1}, {"alpha": 0}, {"alpha": -8}, {"weight_decay": -1}),
        *({"schedule": "cosin"}, {"optimizer": "adam"}, {"start": "eva"}, {"patience": 0}),
    ],
)
def test_settings_that_cannot_work_are_refused(wrong):
    with pytest.raises(TrainError, match=next(iter(wrong))):
        Settings(**wrong)


def test_the_rate_rises_and_falls():
    cosine = [change(warmup=2).rate_at(step, 10) / SETTINGS.rate for step in range(10)]
    assert cosine[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    assert cosine[2:] == sorted(cosine[2:], reverse=True)
    linear = change(warmup=0, schedule="linear")
    assert [linear.rate_at(s, 4) / linear.rate for s in range(4)] == pytest.approx(
        [1, 0.75, 0.5, 0.25]
    )
    assert change(warmup=0, schedule="constant").rate_at(9, 10) == SETTINGS.rate


def test_nothing_to_learn_is_refused():
    with pytest.raises(TrainError, match="0 rows"):
        Course(Card("x"), [], [], SETTINGS)
    with pytest.raises(TrainError, match="different names"):
        train(tiny_base(), [])


def test_a_loss_that_is_no_number_is_refused():
    base = tiny_base()
    wild = change(rate=1e38)
    with pytest.raises(TrainError, match="lower"):
        train(base, [course(base, "x", settings=wild)])
    assert type(base.model.model.layers[0].mlp.up_proj) is torch.nn.Linear


def test_out_of_memory_halves_the_micro_batch_and_names_the_levers_at_last(monkeypatch):
    base = tiny_base()
    taken = []

    def tight(mixed, learners, steps, run):
        taken.append(run.micro_tokens)
        if run.micro_tokens > 40:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
        return gradients(mixed, learners, steps, run)

    monkeypatch.setattr("loramix.train.loop.gradients", tight)
    train(base, [course(base, "x")], Run(micro_tokens=128))
    assert taken[:4] == [128, 64, 32, 32]
    monkeypatch.setattr("loramix.train.loop.gradients", full)
    with pytest.raises(TrainError, match="gradient_checkpointing: true, a smaller per_device"):
        train(base, [course(base, "x")], Run(micro_tokens=128))


def full(mixed, learners, steps, run):
    raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
