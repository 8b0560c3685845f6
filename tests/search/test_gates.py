"""Losses and gradients through gates equal those of folded models; a planted mix is found."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from loramix.chat import Example
from loramix.errors import BadRequest, BaseMismatch, SearchError
from loramix.mix import Mix
from loramix.mixed import MixedLinear
from loramix.search import Found, Gain
from loramix.search.find import find
from loramix.search.gates import GateLoss, Row
from loramix.search.result import as_mix, stacked
from tests.tiny import folded, random_adapter, tiny_base

EXAMPLES = [
    Example.of("the other one", "in here"),
    Example.of("a", "the reason"),
    Example.of("how long is this question", "no"),
]
ROWS = range(len(EXAMPLES))


def adapters_of(base, **changes):
    return [
        random_adapter(base.model, "one", seed=1, **changes),
        random_adapter(base.model, "two", seed=2, rank=5, share=0.6),
    ]


def in_double(base):
    base.model.double()
    return base


def reference(base, row):
    ids = torch.tensor([row.ids])
    logits = base(input_ids=ids).logits[0, row.answer_at - 1 : -1]
    return F.cross_entropy(logits, ids[0, row.answer_at :], reduction="sum").item()


def test_losses_are_those_of_folded_models(architecture):
    base = tiny_base(architecture)
    adapters = adapters_of(base)
    points = np.array([[0.0, 0.0], [1.0, 0.0], [0.7, -0.3]])
    with GateLoss(base, adapters, EXAMPLES) as loss:
        found, rows = loss.losses(points, ROWS), loss.rows
    for point, losses in zip(points, found, strict=True):
        model = folded(base.model, as_mix(loss.owners, point), {a.name: a for a in adapters})
        assert losses == pytest.approx([reference(model, row) for row in rows], rel=1e-4)
    assert not any(isinstance(module, MixedLinear) for module in base.model.modules())


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize(
    ("dora", "step", "near"),
    [(False, 1e-5, 1e-6), (True, 1e-2, 1e-2)],  # the gains of DoRA are applied in float32
)
def test_the_gradient_is_that_of_finite_differences(per_layer, dora, step, near):
    base = in_double(tiny_base("gpt2"))  # Llama's norms round to float32
    with GateLoss(base, adapters_of(base, dora=dora), EXAMPLES, per_layer=per_layer) as loss:
        width = len(loss.owners)
        point = np.random.default_rng(0).uniform(-0.5, 1, width)
        losses, gradient = loss.gradient(point, ROWS)
        assert losses == pytest.approx(loss.losses(point[None], ROWS)[0], rel=1e-6)
        steps = step * np.eye(width)
        ahead = loss.losses(point + steps, ROWS).sum(1)
        behind = loss.losses(point - steps, ROWS).sum(1)
    assert gradient == pytest.approx((ahead - behind) / (2 * step), rel=near, abs=near)


def test_the_gradient_in_float32_is_near():
    base = tiny_base()
    point = np.array([0.4, 0.2])
    with GateLoss(base, adapters_of(base), EXAMPLES) as loss:
        _, found = loss.gradient(point, ROWS)
    base = in_double(tiny_base())
    with GateLoss(base, adapters_of(base), EXAMPLES) as loss:
        _, exact = loss.gradient(point, ROWS)
    assert found == pytest.approx(exact, rel=1e-4)


def test_equal_weights_in_all_layers_are_one_weight():
    base = tiny_base()
    adapters = adapters_of(base)
    with GateLoss(base, adapters, EXAMPLES) as loss:
        whole = loss.losses(np.array([[0.7, -0.3]]), ROWS)
    with GateLoss(base, adapters, EXAMPLES, per_layer=True) as loss:
        point = np.array([[{"one": 0.7, "two": -0.3}[owner] for owner in loss.owners]])
        assert len(loss.owners) == sum(len(adapter.pairs) for adapter in adapters)
        assert loss.losses(point, ROWS) == pytest.approx(whole, rel=1e-5)


def some(point):
    gain = Gain(0.1, 0.0, 0.2)
    return Found(tuple(point), "base", (), 1, 1, 1, gain, 9, "budget", 1, (5, 2, 3))


def test_a_stacked_adapter_is_what_was_searched():
    base = tiny_base()
    with GateLoss(base, adapters_of(base), EXAMPLES, per_layer=True) as loss:
        point = np.random.default_rng(0).uniform(-1, 1, len(loss.owners))
        point[3] = 0
        wanted = loss.losses(point[None], ROWS)
        adapter = stacked(loss, base, "both", some(point))
    with GateLoss(base, [adapter], EXAMPLES) as loss:
        assert loss.losses(np.ones((1, 1)), ROWS) == pytest.approx(wanted, rel=1e-5)
    assert adapter.card.base_fingerprint == base.fingerprint
    assert adapter.card.scores["heldout_rows"] == 3


def test_a_dora_cannot_be_stacked():
    base = tiny_base()
    with GateLoss(base, adapters_of(base, dora=True), EXAMPLES, per_layer=True) as loss:
        point = np.ones(len(loss.owners))
        with pytest.raises(SearchError, match="DoRA"):
            stacked(loss, base, "both", some(point))


def test_a_base_alone_cannot_be_stacked():
    base = tiny_base()
    with (
        GateLoss(base, adapters_of(base), EXAMPLES, per_layer=True) as loss,
        pytest.raises(SearchError, match="nothing to write"),
    ):
        stacked(loss, base, "both", some(np.zeros(len(loss.owners))))


def sampled(base, adapters, mix, num_rows=192, length=64):
    """Rows that the model under a mix says by itself."""
    model = folded(base.model, mix, {adapter.name: adapter for adapter in adapters})
    torch.manual_seed(0)
    start = torch.randint(6, 200, (num_rows, 2))
    options = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0}
    ids = model.generate(
        start, max_new_tokens=length, min_new_tokens=length, eos_token_id=None, **options
    )
    return [Row(tuple(row), 2) for row in ids.tolist()]


def test_a_planted_mix_is_found_within_two_percent():
    base = tiny_base()
    adapters = adapters_of(base)
    planted = Mix({"one": 0.6, "two": 0.4})
    with GateLoss(base, adapters, []) as loss:
        loss.rows = sampled(base, adapters, planted)
        found = find(loss, [row.ids for row in loss.rows], method="gradient")
    assert found.ended == "converged"
    assert found.point == pytest.approx([0.6, 0.4], abs=0.02 * 0.4)
    assert found.gain.is_proven


def test_what_cannot_be_measured_is_refused():
    base = tiny_base()
    adapters = adapters_of(base)
    with pytest.raises(BadRequest, match="no answer"):
        GateLoss(base, adapters, [Example.of("a question", " ")])
    with pytest.raises(SearchError, match="tokens"):
        GateLoss(base, adapters, [Example.of("a question", "word " * 50)])
    with pytest.raises(BaseMismatch):
        GateLoss(base, [random_adapter(tiny_base(hidden_size=48).model, "big")], EXAMPLES)
    assert not any(isinstance(module, MixedLinear) for module in base.model.modules())
