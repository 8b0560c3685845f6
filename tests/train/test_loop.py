"""An expert learns through the layers that serve it, with the gradients PEFT would give."""

import dataclasses
import math
import warnings

import pytest
import torch

from loramix.adapter import Adapter, Card
from loramix.chat import Example
from loramix.errors import TrainError
from loramix.formats import peft
from loramix.lora import Pair
from loramix.mixed import MixedModel, linear_shapes
from loramix.train.config import Settings
from loramix.train.data import IGNORED, collate, tokenise
from loramix.train.loop import answer_loss, new_pairs, train, validation_loss
from tests.tiny import tiny_base

COLOURS = {"the sky": "blue", "the grass": "green", "the snow": "white", "the coal": "black"}
SETTINGS = Settings(rank=4, rate=3e-2, epochs=30, batch_size=2, max_length=64)


def rows_of(base):
    return [tokenise(base.tokenizer, Example.of(*pair), 64) for pair in COLOURS.items()]


def test_an_expert_learns_its_rows_and_the_base_is_given_back():
    base = tiny_base()
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    rows, seen = rows_of(base), []
    expert = train(base, Card("colours"), rows, rows, SETTINGS, report=seen.append)
    assert seen[-1].validation < seen[0].loss / 3  # the frozen output layer bounds it from below
    after = base.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert expert.digest == peft.digest(expert.pairs)
    mixed = MixedModel(base.model)
    mixed.bind(expert)
    served = validation_loss(mixed, "colours", rows, SETTINGS)
    assert served == pytest.approx(min(p.validation for p in seen if p.validation is not None))


def test_the_same_seed_learns_the_same_expert():
    experts = [
        train(
            base, Card("x"), rows_of(base), rows_of(base), dataclasses.replace(SETTINGS, epochs=2)
        )
        for base in (tiny_base(), tiny_base())
    ]
    for layer, pair in experts[0].pairs.items():
        assert torch.equal(pair.b, experts[1].pairs[layer].b)


def test_the_validation_loss_is_the_mean_over_all_answer_tokens():
    base = tiny_base()
    rows = rows_of(base)
    mixed = MixedModel(base.model)
    mixed.bind(Adapter("x", new_pairs(linear_shapes(base.model), 2), "d", Card("x")))
    one_by_one = [
        (answer_loss(mixed, "x", collate([row]), SETTINGS).item(), row.num_learned) for row in rows
    ]
    expected = sum(loss * n for loss, n in one_by_one) / sum(n for _, n in one_by_one)
    assert validation_loss(mixed, "x", rows, SETTINGS) == pytest.approx(expected, rel=1e-5)


def test_gradients_equal_pefts():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from peft import LoraConfig, get_peft_model

    base, twin = tiny_base(), tiny_base()
    batch = collate(rows_of(base))
    pairs = new_pairs(linear_shapes(base.model), 3)
    for pair in pairs.values():
        torch.nn.init.normal_(pair.b, std=0.1)
    mixed = MixedModel(base.model)
    mixed.bind(Adapter("x", pairs, "d", Card("x")))
    answer_loss(mixed, "x", batch, SETTINGS).backward()

    config = LoraConfig(r=3, lora_alpha=3, target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = get_peft_model(twin.model, config)
    for name, layer in peft.base_model.model.named_modules():
        if name in pairs:
            layer.lora_A["default"].weight.data = pairs[name].a.detach().clone()
            layer.lora_B["default"].weight.data = pairs[name].b.detach().clone()
    labels = torch.full_like(batch.ids, IGNORED)
    labels[:, -batch.num_last :] = batch.labels
    peft(
        input_ids=batch.ids,
        attention_mask=batch.mask,
        position_ids=batch.positions,
        labels=labels,
    ).loss.backward()
    for name, layer in peft.base_model.model.named_modules():
        if name in pairs:
            torch.testing.assert_close(
                pairs[name].a.grad, layer.lora_A["default"].weight.grad, rtol=1e-4, atol=1e-6
            )
            torch.testing.assert_close(
                pairs[name].b.grad, layer.lora_B["default"].weight.grad, rtol=1e-4, atol=1e-6
            )


def test_a_fresh_expert_is_the_base():
    pairs = new_pairs({"layer": (6, 4), "lm_head": (9, 4)}, 2)
    assert pairs.keys() == {"layer"}
    assert not pairs["layer"].delta().any()
    assert isinstance(pairs["layer"], Pair)


def test_pairs_lie_where_the_base_does_so_that_layers_learn_them_and_no_copy():
    pair = new_pairs({"layer": (5, 7)}, 2, "meta")["layer"]
    assert (pair.a.device.type, pair.b.device.type) == ("meta", "meta")
    assert pair.a.is_leaf
    assert pair.b.is_leaf


@pytest.mark.parametrize(
    "wrong",
    [
        *({"rank": 0}, {"rate": -1}, {"epochs": 0}, {"epochs": math.nan}, {"batch_size": 0}),
        *({"dropout": 1.0}, {"warmup": -1}, {"alpha": 0}, {"alpha": -8}, {"weight_decay": -1}),
    ],
)
def test_settings_that_cannot_work_are_refused(wrong):
    with pytest.raises(TrainError, match=next(iter(wrong))):
        Settings(**wrong)


def test_alpha_is_a_rate():
    assert Settings(rank=8, alpha=16, rate=1e-3).b_rate == pytest.approx(2e-3)
    assert Settings(rank=8, rate=1e-3).b_rate == pytest.approx(2e-3)
    assert Settings(rank=8, alpha=4, rate=1e-3).b_rate == pytest.approx(5e-4)


def test_nothing_to_learn_is_refused():
    with pytest.raises(TrainError, match="0 rows"):
        train(tiny_base(), Card("x"), [], [], SETTINGS)


def test_a_loss_that_is_no_number_is_refused():
    base = tiny_base()
    wild = dataclasses.replace(SETTINGS, rate=1e38)
    with pytest.raises(TrainError, match="lower the rate"):
        train(base, Card("x"), rows_of(base), rows_of(base), wild)
