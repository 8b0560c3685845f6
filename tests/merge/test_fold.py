"""A mix as one adapter: what PEFT says of it, what is refused, what is written."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loramix.adapter import Adapter, Card
from loramix.base import Base
from loramix.chat import Example
from loramix.errors import AdapterError, BaseMismatch, FormatError, MergeError
from loramix.formats import peft
from loramix.formats.folder import RECIPE
from loramix.lora import Pair
from loramix.merge.core import Size
from loramix.merge.fold import merge_adapters
from loramix.merge.methods import METHODS
from loramix.merge.moments import gathered
from loramix.merge.recipe import Recipe, Setting, settings_of
from loramix.mix import Mix
from tests.peft_twin import PROBE, load_in_peft, save_twin
from tests.tiny import folded, random_adapter, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def adapters(model):
    """Of unequal ranks, on different layers."""
    return {
        "a": random_adapter(model, "a", rank=3, seed=1),
        "b": random_adapter(model, "b", rank=5, seed=2, share=0.6),
    }


def recipe(mix, method="sum", *given):
    return Recipe(Mix.parse(mix), method, settings_of(given))


def delta(adapter, layer):
    pair = adapter.pairs[layer]
    return pair.b.double() @ pair.a.double()


@pytest.mark.parametrize("mix", ["a:0.6+b:0.4", "a:-0.5+b:2", "b:0.25"])
def test_a_merged_adapter_acts_in_peft_as_the_mix_in_the_weights(mix, model, adapters, tmp_path):
    merge_adapters(adapters, recipe(mix)).save(tmp_path / "out")
    expected = folded(model, Mix.parse(mix), adapters)(PROBE).logits
    torch.testing.assert_close(
        load_in_peft(model, tmp_path / "out"), expected, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    ],
    ids=["plain", "rslora", "dora", "patterns"],
)
def test_one_adapter_at_weight_one_is_itself_in_peft(config, model, tmp_path):
    """What PEFT's own add_weighted_adapter gets wrong by 270 % for rsLoRA and 67 % for DoRA."""
    targets = ["q_proj", "v_proj", "up_proj"]
    expected = save_twin(model, tmp_path / "one", target_modules=targets, **config)
    one = {"one": peft.read(tmp_path / "one")}
    merge_adapters(one, recipe("one")).save(tmp_path / "out")
    torch.testing.assert_close(load_in_peft(model, tmp_path / "out"), expected)
    again = peft.read(tmp_path / "out")
    assert peft.digest(again.pairs) == one["one"].digest


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_makes_an_adapter_that_peft_loads(method, model, adapters, tmp_path):
    how = recipe("a+b", method)
    if how.how.reads_inputs:
        base = Base("tiny", model, tiny_tokenizer(), "")
        rows = [Example.of("the thing", "in there", name) for name in "ab"]
        how = replace(how, moments=gathered(base, adapters, rows))
    merge_adapters(adapters, how).save(tmp_path / "out")
    assert load_in_peft(model, tmp_path / "out").isfinite().all()


@settings(deadline=None, max_examples=10)
@given(rank=st.integers(1, 9))
def test_a_rank_gives_the_truncated_svd(rank, adapters):
    whole = merge_adapters(adapters, recipe("a:0.6+b:0.4"))
    small = merge_adapters(adapters, recipe("a:0.6+b:0.4"), Size(rank))
    for layer, kept in small.kept.items():
        u, s, vt = torch.linalg.svd(delta(whole.adapter, layer), full_matrices=False)
        best = u[:, :rank] * s[:rank] @ vt[:rank]
        torch.testing.assert_close(delta(small.adapter, layer), best, rtol=1e-4, atol=1e-5)
        assert kept == pytest.approx((s[:rank].square().sum() / s.square().sum()).item(), abs=1e-6)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999, 1.0])
def test_an_energy_gives_the_least_rank_that_keeps_it(energy, adapters, model, tmp_path):
    whole = merge_adapters(adapters, recipe("a:0.6+b:0.4"))
    small = merge_adapters(adapters, recipe("a:0.6+b:0.4"), Size(energy=energy))
    for layer, pair in small.adapter.pairs.items():
        s = torch.linalg.svdvals(delta(whole.adapter, layer)).square()
        assert small.kept[layer] >= energy - 1e-6
        assert pair.rank == 1 or s[: pair.rank - 1].sum() / s.sum() < energy
    small.save(tmp_path / "out")  # ranks differ by layer: what PEFT's own merge cannot reload
    assert load_in_peft(model, tmp_path / "out").isfinite().all()


def test_an_update_of_full_rank_is_approximated_as_the_svd_does(adapters):
    """TIES leaves a matrix of full rank; the rank asked for holds what the dense SVD would."""
    found = merge_adapters(adapters, recipe("a+b", "ties", "density=0.4"), Size(8))
    full = merge_adapters(adapters, recipe("a+b", "ties", "density=0.4"), Size(32))
    for layer, kept in full.kept.items():
        assert kept == pytest.approx(1, abs=1e-6)
        s = torch.linalg.svdvals(delta(full.adapter, layer)).square()
        best = (s[:8].sum() / s.sum()).item()
        assert best - 0.01 < found.kept[layer] <= best + 1e-6


def test_settings_hold_for_all_layers_a_range_or_a_part_of_the_name(adapters):
    made = merge_adapters(adapters, recipe("a+b", "sum", "b=0", "b@1-1=3", "b@q_proj=5"))
    for layer in adapters["b"].pairs:
        weight = 5 if "q_proj" in layer else 3 if ".1." in layer else 0
        expected = weight * delta(adapters["b"], layer)
        if layer in adapters["a"].pairs:
            expected = expected + delta(adapters["a"], layer)
        torch.testing.assert_close(delta(made.adapter, layer), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("text", ["density", "=1", "density=", "density=nan", "density=many"])
def test_settings_that_cannot_be_read_are_refused(text):
    with pytest.raises(MergeError, match="name=number"):
        Setting.parse(text)


def test_settings_that_change_nothing_are_refused(adapters):
    with pytest.raises(MergeError, match="no setting 'densty'"):
        recipe("a+b", "ties", "densty=0.2")
    with pytest.raises(MergeError, match="no setting 'density'"):
        recipe("a+b", "sum", "density=0.2")
    for place in ("9-12", "proj", "q_pro"):
        with pytest.raises(MergeError, match="fits none"):
            merge_adapters(adapters, recipe("a+b", "ties", f"density@{place}=0.2"))


def test_what_cannot_be_merged_is_refused(model, adapters):
    with pytest.raises(MergeError, match="nothing to merge"):
        recipe("base")
    with pytest.raises(MergeError, match="cancels"):
        merge_adapters(adapters, recipe("a", "sum", "a=0"))
    with pytest.raises(MergeError, match="at least 1"):
        Size(0)
    with pytest.raises(MergeError, match="not both"):
        Size(4, 0.5)
    with pytest.raises(MergeError, match="expected 0 < energy"):
        Size(energy=1.5)
    with pytest.raises(MergeError, match="full rank"):
        merge_adapters(adapters, recipe("a+b", "ties"), Size(energy=0.9))
    dora = random_adapter(model, "b", dora=True)
    with pytest.raises(MergeError, match="--into"):
        merge_adapters({**adapters, "b": dora}, recipe("a+b"))
    with pytest.raises(MergeError, match="no rank to compress"):
        merge_adapters({"b": dora}, recipe("b"), Size(2))


def test_dora_beside_plain_updates_is_not_written(model, tmp_path):
    dora, plain = random_adapter(model, "a", dora=True), random_adapter(model, "b")
    first, *rest = plain.pairs
    alone = {
        "a": replace(dora, pairs={first: dora.pairs[first]}),
        "b": replace(plain, pairs={layer: plain.pairs[layer] for layer in rest}),
    }
    with pytest.raises(FormatError, match="beside plain ones"):
        merge_adapters(alone, recipe("a+b")).save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_adapters_of_different_bases_are_refused(adapters):
    other = Adapter(
        "b", {"model.layers.0.mlp.up_proj": Pair(torch.ones(1, 7), torch.ones(5, 1))}, "", Card("b")
    )
    with pytest.raises(BaseMismatch, match="different bases"):
        merge_adapters({**adapters, "b": other}, recipe("a+b"))
    cards = [replace(adapters[n].card, base_fingerprint=n * 16) for n in "ab"]
    marked = {n: replace(adapters[n], card=card) for n, card in zip("ab", cards, strict=True)}
    with pytest.raises(BaseMismatch, match="different weights"):
        merge_adapters(marked, recipe("a+b"))


def test_what_is_written_says_how_it_was_made_and_is_written_whole(adapters, tmp_path):
    made = merge_adapters(adapters, recipe("a:0.6+b:0.4", "slerp"), name="Both Of Them")
    made.save(tmp_path / "out")
    told = json.loads((tmp_path / "out" / RECIPE).read_text())
    assert (told["mix"], told["method"]) == ("a:0.6+b:0.4", "slerp")
    assert told["adapters"] == {name: adapters[name].digest for name in "ab"}
    again = peft.read(tmp_path / "out")
    assert again.card.name == "out"
    assert again.card.description == "slerp of a:0.6+b:0.4"
    assert peft.digest(again.pairs) == made.adapter.digest
    with pytest.raises(AdapterError, match="exists"):
        made.save(tmp_path / "out")
    made.save(tmp_path / "out", replace=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
