"""A mix inside a copy of the base: every number, every file."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from loramix.errors import BaseError, BaseMismatch, LoramixError, MergeError
from loramix.formats.licences import stated_licence
from loramix.formats.readme import describe
from loramix.merge import journal, stream
from loramix.merge.stored import open_stored
from loramix.merge.stream import merge_into
from loramix.merge.verify import verify
from loramix.mix import Mix
from tests.merge import dense
from tests.merge.bases import MIX, bytes_of, recipe, save, tensors, two
from tests.peft_twin import PROBE
from tests.tiny import folded, random_adapter, tiny_base


def logits(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()(PROBE).logits.detach()


@pytest.mark.parametrize("dora", [False, True])
def test_the_merged_model_is_the_mix_in_the_weights(architecture, dora, tmp_path):
    base = tiny_base(architecture)
    adapters = two(base.model, dora=dora)
    expected = folded(base.model, Mix.parse(MIX), adapters)(PROBE).logits
    merge_into(save(base, tmp_path / "base"), adapters, recipe(), tmp_path / "out")
    torch.testing.assert_close(logits(tmp_path / "out"), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_is_rounded_once(dtype, tmp_path):
    base = tiny_base("llama")
    adapters = two(base.model)
    did = merge_into(save(base, tmp_path / "base", dtype), adapters, recipe(), tmp_path / "out")
    before, after = tensors(tmp_path / "base"), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, weight in before.items():
        exact = weight.double()
        for adapter, factor in Mix.parse(MIX).items():
            if pair := adapters[adapter].pairs.get(name.removesuffix(".weight")):
                exact = exact + factor * (pair.b.double() @ pair.a.double())
        wrong = (after[name] != exact.to(dtype)).float().mean()
        assert wrong < 2e-3  # exact ties and the like, that a float32 sum decides differently
        assert after[name].dtype == dtype
    assert did.worst <= 0.51
    assert did.num_folded == len({*adapters["a"].pairs, *adapters["b"].pairs})


def test_what_has_no_update_is_the_base_byte_for_byte(llama, tmp_path):
    _, folder, adapters = llama
    only = {"b": adapters["b"]}
    merge_into(folder, only, recipe("b"), tmp_path / "out")
    before, after = tensors(folder), tensors(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{layer}.weight" for layer in adapters["b"].pairs}
    base, out = open_stored(folder), open_stored(tmp_path / "out")
    assert [s.header for s in base.shards] == [s.header for s in out.shards]
    kept = [p for p in folder.iterdir() if p.suffix != ".safetensors" and "index" not in p.name]
    assert len(kept) > 3  # config, generation config, tokenizer, chat template
    for file in kept:
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_each_tensor_has_its_hash(llama, tmp_path):
    _, folder, adapters = llama
    merge_into(folder, adapters, recipe(), tmp_path / "out")
    told = json.loads((tmp_path / "out" / "merge.json").read_text())
    for stored in open_stored(tmp_path / "out").tensors.values():
        with stored.file.open("rb") as file:
            found = journal.sha256_of(file.fileno(), stored.offset, stored.size_bytes)
        assert told["tensors"][stored.name] == found
    assert told["adapters"] == {name: adapters[name].digest for name in "ab"}


def test_a_merged_model_is_verified_against_its_hashes(llama, tmp_path):
    _, folder, adapters = llama
    merge_into(folder, adapters, recipe(), tmp_path / "out")
    assert verify(tmp_path / "out") == len(tensors(folder))
    damaged = open_stored(tmp_path / "out").tensors["model.layers.1.mlp.up_proj.weight"]
    with damaged.file.open("r+b") as stream:
        stream.seek(damaged.offset + damaged.size_bytes - 1)
        stream.write(b"\x7f")
    with pytest.raises(MergeError, match=r"1 of \d+ tensors .* model.layers.1.mlp.up_proj.weight;"):
        verify(tmp_path / "out")
    told = tmp_path / "out" / "merge.json"
    kept = json.loads(told.read_text())
    del kept["tensors"]["lm_head.weight"]
    told.write_text(json.dumps(kept))
    with pytest.raises(MergeError, match=r"tells of: lm_head.weight; merge again"):
        verify(tmp_path / "out")
    with pytest.raises(MergeError, match=r"has no merge.json with the hashes"):
        verify(folder)


@pytest.mark.parametrize("method", ["ties", "sce", "karcher", "tsv-m", "dare", "della"])
def test_a_method_does_the_same_in_an_adapter_and_in_a_base(method, llama, tmp_path):
    from loramix.merge.core import Size
    from loramix.merge.fold import merge_adapters

    _, folder, adapters = llama
    how = recipe("a+b", method)
    whole = merge_adapters(adapters, how, Size(48))
    merge_into(folder, adapters, how, tmp_path / "out")
    before, after = tensors(folder), tensors(tmp_path / "out")
    for layer, pair in whole.adapter.pairs.items():
        found = after[f"{layer}.weight"] - before[f"{layer}.weight"]
        torch.testing.assert_close(found, pair.delta(), rtol=1e-3, atol=1e-4)


def test_ties_into_a_base_is_ties_of_the_updates(llama, tmp_path):
    _, folder, adapters = llama
    merge_into(folder, adapters, recipe("a+b", "ties", "density=0.3"), tmp_path / "out")
    layer = next(iter(adapters["b"].pairs))
    deltas = torch.stack([adapters[n].pairs[layer].delta().double() for n in "ab"])
    expected = dense.ties(deltas, torch.ones(2), 0.3)
    before, after = (tensors(f)[f"{layer}.weight"].double() for f in (folder, tmp_path / "out"))
    torch.testing.assert_close(after - before, expected, rtol=1e-4, atol=1e-5)


def test_shards_of_another_size_hold_the_same(llama, tmp_path):
    _, folder, adapters = llama
    merge_into(folder, adapters, recipe(), tmp_path / "kept")
    merge_into(folder, adapters, recipe(), tmp_path / "small", shard_bytes=9000)
    merge_into(folder, adapters, recipe(), tmp_path / "one", shard_bytes=10**9)
    wanted = tensors(tmp_path / "kept")
    for name, count in (("small", 4), ("one", 1)):
        found = tensors(tmp_path / name)
        assert len(list((tmp_path / name).glob("*.safetensors"))) >= count
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)
        assert torch.equal(logits(tmp_path / name), logits(tmp_path / "kept"))
    assert not (tmp_path / "one" / "model.safetensors.index.json").exists()


def rewritten(folder, out, change):
    """A copy of a base in one file, its tensors changed."""
    out.mkdir()
    shutil.copy(folder / "config.json", out)
    save_file(change(tensors(folder)), out / "model.safetensors", metadata={"format": "pt"})
    return out


def test_fused_projections_and_old_prefixes_on_disk(llama, tmp_path):
    _, folder, adapters = llama

    def fused(found):
        made = {}
        for name, tensor in found.items():
            if "q_proj" in name:
                parts = [found[name.replace("q_proj", f"{p}_proj")] for p in "qkv"]
                made[name.replace("q_proj", "qkv_proj")] = torch.cat(parts)
            elif "gate_proj" in name:
                parts = [tensor, found[name.replace("gate", "up")]]
                made[name.replace("gate_proj", "gate_up_proj")] = torch.cat(parts)
            elif not any(part in name for part in ("k_proj", "v_proj", "up_proj")):
                made[name] = tensor
        return {f"language_model.{name}": tensor for name, tensor in made.items()}

    merge_into(folder, adapters, recipe(), tmp_path / "plain")
    other = rewritten(folder, tmp_path / "fused", fused)
    merge_into(other, adapters, recipe(), tmp_path / "out")
    expected, found = fused(tensors(tmp_path / "plain")), tensors(tmp_path / "out")
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name])


def test_one_file_beside_an_index_keeps_its_index(llama, tmp_path):
    _, folder, adapters = llama
    one = rewritten(folder, tmp_path / "base", lambda found: found)
    name = "model-00001-of-00001.safetensors"
    (one / "model.safetensors").rename(one / name)
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors(one), name)}
    (one / "model.safetensors.index.json").write_text(json.dumps(index))
    merge_into(one, adapters, recipe(), tmp_path / "out")
    merge_into(folder, adapters, recipe(), tmp_path / "whole")
    assert torch.equal(logits(tmp_path / "out"), logits(tmp_path / "whole"))


def test_rows_that_two_layers_would_own_are_refused(llama, tmp_path):
    _, folder, adapters = llama
    older = {name.removeprefix("model."): pair for name, pair in adapters["b"].pairs.items()}
    both = {**adapters, "b": replace(adapters["b"], pairs=older)}
    with pytest.raises(BaseMismatch, match="the same rows"):
        merge_into(folder, both, recipe(), tmp_path / "out")
    merge_into(folder, {"b": both["b"]}, recipe("b"), tmp_path / "out")


def test_a_merged_model_has_a_card(llama, tmp_path):
    _, folder, adapters = llama
    told = {
        name: replace(each, card=replace(each.card, base="owner/base", licence=licence))
        for (name, each), licence in zip(
            sorted(adapters.items()), ["mit", "cc-by-4.0"], strict=True
        )
    }
    base = tmp_path / "base"
    shutil.copytree(folder, base)
    merge_into(base, told, recipe(), tmp_path / "out")
    matter = describe(tmp_path / "out").front_matter()
    assert matter["base_model"] == "owner/base"
    assert matter["base_model_relation"] == "merge"
    assert "license" not in matter  # the base states none
    for licence, all_of_them in (("apache-2.0", "cc-by-4.0"), ("llama2", "llama2")):
        (base / "README.md").write_text(f"---\nlicense: {licence}\n---\n# Base\n")
        merge_into(base, told, recipe(), tmp_path / licence)
        assert describe(tmp_path / licence).front_matter()["license"] == all_of_them
        assert not (tmp_path / licence / "README.md").exists()


def test_a_licence_is_what_the_files_state(tmp_path):
    readme = tmp_path / "README.md"
    for text in ("# Base", "---\nlicense: [mit]\n---", "---\na: {\n---", "---\n- x\n---"):
        readme.write_text(text)
        assert stated_licence(tmp_path) == ""
    readme.write_bytes(b"\xff\xfe")
    assert stated_licence(tmp_path) == ""
    readme.write_text("---\nlicense: mit\n---\n")
    (tmp_path / "card.json").write_text(json.dumps({"name": "x", "licence": ""}))
    assert stated_licence(tmp_path) == "mit"
    (tmp_path / "card.json").write_text(json.dumps({"name": "x", "licence": "gemma"}))
    assert stated_licence(tmp_path) == "gemma"


def test_the_base_is_not_replaced_by_its_merge(llama, tmp_path):
    _, folder, adapters = llama
    base = tmp_path / "models" / "base"
    shutil.copytree(folder, base)
    before = bytes_of(base)
    for out in (base, base.parent):
        with pytest.raises(MergeError, match="the base itself"):
            merge_into(base, adapters, recipe(), out, replace=True)
    assert bytes_of(base) == before


def damaged(folder, out, name, change):
    shutil.copytree(folder, out)
    (out / name).write_bytes(change((out / name).read_bytes()))
    return out


def test_bases_that_cannot_take_an_update_are_refused(llama, tmp_path):
    _, folder, adapters = llama

    def refused(error, words, given, **options):
        with pytest.raises(error, match=words):
            merge_into(given, adapters, recipe(), tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()

    with_config = lambda **more: lambda raw: json.dumps(json.loads(raw) | more).encode()  # noqa: E731
    bits = with_config(quantization_config={"quant_method": "gptq"})
    refused(BaseError, "gptq", damaged(folder, tmp_path / "q", "config.json", bits))
    refused(BaseError, "cannot be read", tmp_path / "nowhere")
    shard = sorted(folder.glob("*.safetensors"))[0].name
    refused(BaseError, "header says", damaged(folder, tmp_path / "s", shard, lambda raw: raw[:-5]))
    refused(
        BaseError, "fetch it again", damaged(folder, tmp_path / "h", shard, lambda raw: b"{" * 99)
    )
    refused(BaseError, "fetch", damaged(folder, tmp_path / "e", shard, lambda raw: b""))
    for index in ({}, {"weight_map": ["model.safetensors"]}, {"weight_map": {"lm_head": 1}}):
        shutil.rmtree(tmp_path / "i", ignore_errors=True)
        raw = json.dumps(index).encode()
        bad = damaged(folder, tmp_path / "i", "model.safetensors.index.json", lambda _: raw)  # noqa: B023
        refused(BaseError, "no map of tensors", bad)
    eight = rewritten(
        folder, tmp_path / "i8", lambda t: {k: v.to(torch.int8) for k, v in t.items()}
    )
    refused(BaseError, "quantised format", eight)
    lacking = rewritten(
        folder, tmp_path / "less", lambda t: {k: v for k, v in t.items() if "up_" not in k}
    )
    refused(BaseMismatch, "find no tensor", lacking)
    wide = rewritten(
        folder, tmp_path / "wide", lambda t: {k: torch.cat([v, v]) for k, v in t.items()}
    )
    refused(BaseMismatch, "has an update of shape", wide)
    nan = rewritten(folder, tmp_path / "nan", lambda t: {k: v * torch.nan for k, v in t.items()})
    refused(MergeError, "not a number", nan)
    refused(MergeError, "holds nothing", folder, shard_bytes=0)


def test_an_output_layer_that_is_the_embedding_is_not_folded(tmp_path):
    base = tiny_base("llama", tie_word_embeddings=True)
    adapter = random_adapter(base.model, "a")
    pairs = {"lm_head": adapter.pairs["model.layers.0.self_attn.q_proj"]}
    head = {"a": replace(adapter, pairs=pairs)}
    folder = save(base, tmp_path / "base")
    with pytest.raises(BaseMismatch, match="embedding itself"):
        merge_into(folder, head, recipe("a"), tmp_path / "out")


def test_half_precision_that_would_overflow_is_refused(tmp_path):
    base = tiny_base("llama")
    folder = save(base, tmp_path / "base", torch.float16)
    with pytest.raises(MergeError, match="range"):
        merge_into(folder, two(base.model), recipe("a:9000000+b"), tmp_path / "out")


def test_a_full_disk_is_noticed_before_anything_is_written(llama, tmp_path, monkeypatch):
    _, folder, adapters = llama
    monkeypatch.setattr(stream, "MARGIN", 10**15)
    with pytest.raises(MergeError, match="GB free"):
        merge_into(folder, adapters, recipe(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_kept_until_the_new_one_is_whole(llama, tmp_path):
    _, folder, adapters = llama
    merge_into(folder, adapters, recipe("a"), tmp_path / "out")
    first = bytes_of(tmp_path / "out")
    with pytest.raises(MergeError, match="exists"):
        merge_into(folder, adapters, recipe("b"), tmp_path / "out")
    with pytest.raises(LoramixError):
        merge_into(tmp_path / "none", adapters, recipe("b"), tmp_path / "out", replace=True)
    assert bytes_of(tmp_path / "out") == first
    merge_into(folder, adapters, recipe("b"), tmp_path / "out", replace=True)
    assert bytes_of(tmp_path / "out") != first
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
