"""What layers are given while adapters answer, and what regmean makes of it."""

from __future__ import annotations

import json

import pytest
import torch

from loramix.adapter import Adapter
from loramix.chat import Example, answered_ids
from loramix.cli import main
from loramix.errors import MergeError
from loramix.formats import peft
from loramix.formats.folder import RECIPE
from loramix.merge.fold import merge_adapters
from loramix.merge.moments import gathered
from loramix.merge.recipe import Recipe
from loramix.mix import Mix
from tests.merge import dense
from tests.tiny import folded, random_adapter, tiny_base

ROWS = [
    Example.of("the the", "a thing", "a"),
    Example.of("another in there", "on", "a"),
    Example.of("hello", "or the other", "b"),
]


@pytest.fixture(scope="module")
def base():
    return tiny_base("llama")


@pytest.fixture(scope="module")
def adapters(base):
    """Of unequal ranks, on different layers."""
    return {
        "a": random_adapter(base.model, "a", rank=3, seed=1),
        "b": random_adapter(base.model, "b", rank=5, seed=2, share=0.6),
    }


def given_to(model, layer, rows, tokenizer):
    """Every input of a layer, [N, D]."""
    found = []
    hook = model.get_submodule(layer).register_forward_pre_hook(
        lambda _, given: found.append(given[0].detach().flatten(0, -2).double())
    )
    for row in rows:
        model(torch.tensor([answered_ids(tokenizer, row.messages)]))
    hook.remove()
    return torch.cat(found)


def seen(base, adapters, layer):
    """By adapter: what the layer is given in the model with that adapter in its weights."""
    return {
        name: given_to(
            folded(base.model, Mix({name: 1}), adapters),
            layer,
            [row for row in ROWS if row.adapter == name],
            base.tokenizer,
        )
        for name in "ab"
    }


def test_moments_are_those_of_each_adapters_own_model(architecture):
    base = tiny_base(architecture)
    adapters = {n: random_adapter(base.model, n, rank=2 + s, seed=s) for s, n in enumerate("ab")}
    found = gathered(base, dict(reversed(adapters.items())), ROWS)
    layers = list(adapters["a"].pairs)
    for layer in (layers[0], layers[-1]):
        a = torch.cat([adapters[name].pairs[layer].a for name in "ab"]).double()
        for k, x in enumerate(seen(base, adapters, layer).values()):
            inputs = found.by_layer[layer]
            torch.testing.assert_close(
                inputs.gram[k], a @ x.T @ x @ a.T / len(x), rtol=1e-4, atol=1e-4
            )
            torch.testing.assert_close(inputs.squares[k], x.square().mean(0), rtol=1e-4, atol=1e-4)


def test_the_merge_is_that_of_the_paper_on_what_layers_are_given(base, adapters):
    """Dense from end to end: models with one adapter each, their inputs, their updates."""
    moments = gathered(base, adapters, ROWS)
    mix = Mix.parse("a:0.6+b:0.4")
    merged = merge_adapters(adapters, Recipe(mix, "regmean", moments=moments))
    for layer in list(adapters["b"].pairs)[:3]:
        pairs = [adapters[name].pairs[layer] for name in "ab"]
        deltas = torch.stack([pair.delta().double() for pair in pairs])
        v = torch.linalg.svd(torch.cat([p.a for p in pairs]).double(), full_matrices=False).Vh.T
        rows = list(seen(base, adapters, layer).values())
        expected = dense.regmean(deltas, rows, torch.tensor([0.6, 0.4]).double(), 0.9, v)
        found = merged.adapter.pairs[layer].delta().double()
        assert (found - expected).norm() < 1e-3 * expected.norm()


def test_the_base_is_given_back_as_it_was(base, adapters):
    before = [type(module) for module in base.model.modules()]
    gathered(base, adapters, ROWS)
    with pytest.raises(MergeError):
        gathered(base, adapters, ROWS[:1])
    assert [type(module) for module in base.model.modules()] == before


def test_what_cannot_be_gathered_is_refused(base, adapters):
    with pytest.raises(MergeError, match="is of no adapter"):
        gathered(base, adapters, [*ROWS, Example.of("x", "y")])
    with pytest.raises(MergeError, match="is of c; expected"):
        gathered(base, adapters, [*ROWS, Example.of("x", "y", "c")])
    with pytest.raises(MergeError, match="no rows of b"):
        gathered(base, adapters, ROWS[:2])
    with pytest.raises(MergeError, match="this base holds 128"):
        gathered(base, adapters, [*ROWS, Example.of("x" * 200, "y", "a")])
    dora = {**adapters, "b": random_adapter(base.model, "b", dora=True)}
    with pytest.raises(MergeError, match="DoRA"):
        gathered(base, dora, ROWS)


def test_moments_go_with_their_mix_and_method(base, adapters):
    moments = gathered(base, adapters, ROWS)
    with pytest.raises(MergeError, match="under a, b, and a is to be merged"):
        Recipe(Mix.parse("a"), "regmean", moments=moments)
    with pytest.raises(MergeError, match="ties weighs by no rows"):
        Recipe(Mix.parse("a+b"), "ties", moments=moments)
    with pytest.raises(MergeError, match="--data"):
        merge_adapters(adapters, Recipe(Mix.parse("a+b"), "regmean"))


def test_the_command(shop, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [{"adapter": n, "query": "the thing", "answer": n} for n in ("banking", "sql")]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, lines)))
    words = ["merge", *shop.flags, "-m", "banking+sql", "--method", "regmean"]
    assert main([*words, "--data", str(rows), "-o", "both"]) == 0
    assert main([*words, "--data", str(rows), "--into", shop.base, "-o", "whole"]) == 0
    told = json.loads((tmp_path / "both" / RECIPE).read_text())
    assert list(told["rows"]["tokens"]) == ["banking", "sql"]
    assert told["rows"] == json.loads((tmp_path / "whole" / RECIPE).read_text())["rows"]
    assert isinstance(peft.read(tmp_path / "both"), Adapter)
    capsys.readouterr()
    for refused, says in (
        (words, "with --data"),
        ([*words[:-1], "ties", "--data", str(rows)], "ties weighs by no rows"),
        ([*words, "--data", "nowhere"], "nowhere"),
    ):
        assert main([*refused, "-o", "x"]) == 1
        assert says in capsys.readouterr().err
    assert main([*words, "--data", str(rows), "--lint"]) == 1
    assert "only looks" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
