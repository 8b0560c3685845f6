"""What is told before a merge, and proved after it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch

import loramix
from loramix.cli import main
from loramix.errors import BaseMismatch, MergeError
from loramix.formats import peft
from loramix.formats.readme import describe, render
from loramix.lora import Pair
from loramix.merge.fold import merge_adapters
from loramix.merge.lint import fingerprint, lint
from loramix.merge.proof import prove
from loramix.merge.recipe import Recipe, settings_of
from loramix.merge.stored import open_stored
from loramix.merge.stream import merge_into
from loramix.mix import Mix
from tests.peft_twin import PROBE, load_in_peft
from tests.tiny import folded, random_adapter, tiny_base


def save(base, folder, dtype=torch.float32):
    base.model.to(dtype).save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    base.model.float()
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    base = tiny_base("llama")
    adapters = {n: random_adapter(base.model, n, rank=4, seed=s) for s, n in enumerate("ab")}
    return base, save(base, tmp_path_factory.mktemp("llama") / "base"), adapters


def both(mix="a+b"):
    return Recipe(Mix.parse(mix))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_base_has_one_fingerprint_open_or_on_disk(architecture, dtype, tmp_path):
    base = tiny_base(architecture)
    if architecture == "gpt_neox":
        pytest.skip("its output layer has an older name in files")
    assert fingerprint(open_stored(save(base, tmp_path / "base", dtype))) == base.fingerprint


def test_it_is_told_whether_the_base_is_the_one(llama):
    base, folder, adapters = llama
    marks = {"a": base.fingerprint, "b": "0" * 16}
    cards = {n: replace(adapters[n].card, base_fingerprint=mark) for n, mark in marks.items()}
    known = {n: replace(adapters[n], card=card) for n, card in cards.items()}
    for name, word in (("a", "same"), ("b", "differs")):
        found = lint(known, both(name), folder)
        assert found.fingerprints == {name: word}
        assert any("other weights" in line for line in found.advice) == (word == "differs")
    with pytest.raises(BaseMismatch):
        lint(known, both(), folder)


def test_how_two_adapters_meet(llama):
    _, _, adapters = llama
    one = adapters["a"]
    against = replace(one, name="c", pairs={k: Pair(p.a, -2 * p.b) for k, p in one.pairs.items()})
    (met,) = lint({**adapters, "c": against}, both("a+c")).meetings
    assert met.cosine == pytest.approx(-1, abs=1e-6)
    assert met.conflict > 0.999
    assert met.writes_overlap == pytest.approx(1, abs=1e-5)
    assert met.reads_overlap == pytest.approx(1, abs=1e-5)
    assert any("opposite" in line for line in lint({"a": one, "c": against}, both("a+c")).advice)
    turned = lint({"a": one, "c": against}, both("a+c:-1"))
    assert turned.meetings[0].cosine == pytest.approx(1, abs=1e-6)
    assert turned.meetings[0].conflict < 0.001
    assert any("much alike" in line for line in turned.advice)
    mirrored = {k: Pair(p.a, p.b.roll(1, dims=1)) for k, p in one.pairs.items()}
    same_space = lint({"a": one, "c": replace(one, name="c", pairs=mirrored)}, both("a+c"))
    assert any("same subspace" in line for line in same_space.advice)
    assert not any("nothing speaks against" in line for line in same_space.advice)
    assert any("nothing speaks against" in line for line in lint(adapters, both()).advice)
    (met,) = lint(adapters, both()).meetings
    assert abs(met.cosine) < 0.1
    assert 0.4 < met.conflict < 0.6
    assert met.writes_overlap < 0.3


def test_what_a_rank_keeps_and_what_rounding_loses(llama, tmp_path):
    base, folder, adapters = llama
    found = lint(adapters, both(), folder)
    assert found.kept[8] == pytest.approx(1)
    assert 0.3 < found.kept[4] < 1
    assert found.lost < 1e-5
    tiny = {n: replace(a, pairs={k: Pair(p.a, 0.002 * p.b) for k, p in a.pairs.items()})
            for n, a in adapters.items()}  # fmt: skip
    coarse = lint(tiny, both(), save(base, tmp_path / "bf16", torch.bfloat16))
    assert coarse.lost > 0.3
    assert any("Rounding" in line for line in coarse.advice)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3"])
def test_what_rounding_loses_is_that_of_the_merge(architecture, tmp_path):
    base = tiny_base(architecture)
    made = random_adapter(base.model, "a", rank=4)
    small = {k: Pair(p.a, 0.002 * p.b) for k, p in made.pairs.items()}
    adapters, folder = {"a": replace(made, pairs=small)}, tmp_path / "base"
    save(base, folder, torch.bfloat16)
    told = lint(adapters, both("a"), folder).lost
    merge_into(folder, adapters, both("a"), tmp_path / "out")
    before, after = (open_stored(at).tensors for at in (folder, tmp_path / "out"))
    lost, whole = 0.0, 0.0
    for layer, pair in small.items():
        name = next(key for key in before if key.endswith(f"{layer}.weight"))
        stored, delta = before[name], pair.delta().double()
        is_conv = architecture == "gpt2" and ".c_" in layer
        delta = delta.T if is_conv else delta
        rows = [at[name].rows(0, stored.shape[0]).double() for at in (before, after)]
        lost += float((rows[1] - rows[0] - delta).square().sum())
        whole += float(delta.square().sum())
    assert told == pytest.approx((lost / whole) ** 0.5, rel=0.3)


def test_of_dora_alone_no_loss_is_claimed(llama):
    base, folder, _ = llama
    found = lint({"a": random_adapter(base.model, "a", dora=True)}, both("a"), folder)
    assert (found.kept, found.lost) == ({}, None)


def test_a_merged_model_is_proved_to_be_the_mix(llama, tmp_path):
    _, folder, adapters = llama
    merge_into(folder, adapters, both("a:0.6+b:-0.4"), tmp_path / "out")
    right = prove(folder, tmp_path / "out", adapters, both("a:0.6+b:-0.4"))
    assert right.max_kl < 1e-6 < 1e-3 < right.base_kl
    assert right.alone == 0
    told = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert told["proof"]["max_kl"] == right.max_kl
    assert prove(folder, tmp_path / "out", adapters, both("a")).mean_kl > 1e-3


@pytest.mark.parametrize("method", ["core-sum", "ties"])
def test_a_merged_adapter_is_proved_too(method, llama, tmp_path):
    _, folder, adapters = llama
    recipe = Recipe(Mix.parse("a:0.6+b:0.4"), method, settings_of(["a@0-0=0.6"]))
    merge_adapters(adapters, recipe).save(tmp_path / "out")
    found = prove(folder, tmp_path / "out", adapters, recipe)
    assert (found.max_kl < 1e-6) == (found.alone < 1e-5) == (method == "core-sum")
    assert found.alone < 0.9  # ties keeps a fifth of the entries, the largest
    told = render(describe(tmp_path / "out"))
    assert f"within {found.alone:.1e} of itself" in told


def test_the_command_looks_and_proves(shop, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mix = ["merge", "--library", shop.library, "-m", "sql:0.5+banking:0.5", "--into", shop.base]
    assert main([*mix, "--lint"]) == 0
    told = capsys.readouterr().out
    assert "Energy of the sum by rank" in told
    assert not list(tmp_path.iterdir())
    assert main([*mix, "-o", "out", "--prove", "--verify", "--shard-size", "20KB"]) == 0
    told = capsys.readouterr().out
    assert "KL(mix || merged)" in told
    assert "all 21 tensors have the hash" in told
    assert main([*mix[:-2], "--base", shop.base, "-o", "both", "--prove"]) == 0
    assert "KL(mix || merged)" in capsys.readouterr().out
    assert main([*mix[:-2], "-o", "x", "--shard-size", "20KB"]) == 1
    assert main([*mix, "-o", "x", "--rank", "4"]) == 1
    assert main([*mix, "-o", "x", "--shard-size", "many"]) == 1
    assert main(mix) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"both", "out"}


def test_a_base_that_is_not_the_one_is_told(shop, tmp_path, capsys):
    library = tmp_path / "library"
    shutil.copytree(shop.library, library)
    card = library / "sql" / "card.json"
    card.write_text(json.dumps(json.loads(card.read_text()) | {"base_fingerprint": "0" * 16}))
    words = ["merge", "--library", str(library), "-m", "sql", "--into", shop.base, "-o"]
    assert main([*words, str(tmp_path / "out")]) == 0
    assert "sql was trained on weights other than" in capsys.readouterr().err


def test_merging_from_python(llama, shop, tmp_path):
    base, folder, adapters = llama
    for name in "ab":
        peft.write(adapters[name], tmp_path / name)
    merged = loramix.merge("sql:0.5+banking:0.5", shop.library, rank=2)
    assert {pair.rank for pair in merged.adapter.pairs.values()} == {2}
    merger = loramix.Merger(folder, [tmp_path / "a", tmp_path / "b"])
    merging = merger.merge(method="weighted", weights=[0.6, 0.4])
    merging.save_pretrained(tmp_path / "model")
    expected = folded(base.model, Mix.parse("a:0.6+b:0.4"), adapters)(PROBE).logits
    merging.adapter().save(tmp_path / "adapter")
    torch.testing.assert_close(
        load_in_peft(base.model, tmp_path / "adapter"), expected, rtol=1e-4, atol=1e-4
    )
    twice = loramix.Merger(None, [tmp_path / "a", tmp_path / "a"])
    assert list(twice.adapters) == ["a", "a-2"]
    twice.merge("average").save_pretrained(tmp_path / "mean")
    one = peft.read(tmp_path / "mean").pairs
    for layer, pair in adapters["a"].pairs.items():
        torch.testing.assert_close(one[layer].delta(), pair.delta(), rtol=1e-4, atol=1e-5)
    with pytest.raises(MergeError, match="3 weights for 2"):
        merger.merge("weighted", weights=[1, 2, 3])
    with pytest.raises(MergeError, match="weight for c"):
        merger.merge("weighted", weights={"a": 1, "c": 1})
    with pytest.raises(MergeError, match="no weight for b"):
        merger.merge("weighted", weights={"a": 1})
    with pytest.raises(MergeError, match="at least 1"):
        merging.adapter(rank=0)
    with pytest.raises(MergeError, match="nothing to merge"):
        loramix.Merger(folder, [])
    with pytest.raises(MergeError, match="one file"):
        twice.merge().save_pretrained(tmp_path / "x", shard_bytes=1)


def test_the_function_does_not_hide_the_package():
    import loramix.merge.methods

    assert callable(loramix.merge)
    assert loramix.merge.methods.METHODS
