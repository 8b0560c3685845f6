"""Adapters in GGUF: llama.cpp adds exactly what they mean, and they come back as they were."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from gguf import GGUFWriter, get_tensor_name_map, quants
from gguf.constants import MODEL_ARCH, MODEL_ARCH_NAMES
from hypothesis import given, settings
from hypothesis import strategies as st

from loramix.errors import FormatError
from loramix.formats import peft
from loramix.formats.gguf import writing
from loramix.formats.gguf.adapter import read_adapter, write_adapter
from loramix.formats.gguf.layout import layout
from loramix.formats.gguf.writing import KINDS, LIMITS, Entry, encode
from loramix.lora import Pair
from loramix.merge.fold import merge_adapters
from loramix.merge.recipe import Recipe
from loramix.mix import Mix
from tests.formats.gguf.families import (
    FAMILIES,
    TOKENS,
    TOLERANCE,
    family_model,
    logprobs,
    write_gguf,
)
from tests.formats.gguf.llamacpp import LlamaCpp
from tests.peft_twin import PROBE, save_twin
from tests.tiny import folded, random_adapter, tiny_tokenizer

SIZE = len(tiny_tokenizer())


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_applies_a_mix_as_its_folded_weights(family, tmp_path):
    model = family_model(family)
    adapters = {
        "a": random_adapter(model, "a", rank=3, seed=1, share=0.7),
        "b": random_adapter(model, "b", rank=5, seed=2, share=0.7),
    }
    mix = Mix({"a": 0.6, "b": -1.3})
    one = merge_adapters(adapters, Recipe(mix), name="mix").adapter
    files = [tmp_path / f"{name}.gguf" for name in (*adapters, "mix")]
    for adapter, file in zip((*adapters.values(), one), files, strict=True):
        write_adapter(adapter, model.config, file)
    theirs = LlamaCpp(write_gguf(model, tmp_path), files)
    ours = logprobs(folded(model, mix, adapters))
    close = {"atol": TOLERANCE[family], "rtol": 0}
    assert (ours - logprobs(model)).abs().max() > 0.5
    torch.testing.assert_close(theirs.next_logprobs(TOKENS, SIZE), logprobs(model), **close)
    apart = theirs.next_logprobs(TOKENS, SIZE, {0: mix["a"], 1: mix["b"]})
    torch.testing.assert_close(apart, ours, **close)
    torch.testing.assert_close(theirs.next_logprobs(TOKENS, SIZE, {2: 1.0}), ours, **close)


@pytest.mark.parametrize(
    "config",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 7}, "alpha_pattern": {"v_proj": 31}},
        {"use_rslora": True, "rank_pattern": {"down_proj": 2}, "alpha_pattern": {"q_proj": 3}},
    ],
    ids=str,
)
def test_any_scale_of_peft_is_exact_in_llama_cpp(config, tmp_path):
    """The field's own converter knows alpha alone, and scales these wrongly."""
    model = family_model("llama")
    targets = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
    theirs = save_twin(model, tmp_path / "peft", **(targets | config))
    write_adapter(peft.read(tmp_path / "peft"), model.config, tmp_path / "a.gguf")
    server = LlamaCpp(write_gguf(model, tmp_path), [tmp_path / "a.gguf"])
    for row, logits in zip(PROBE, theirs, strict=True):
        ours = server.next_logprobs(row.tolist(), SIZE, {0: 1.0})
        expected = logits[-1].double().log_softmax(-1)
        torch.testing.assert_close(ours, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_written_is_read_again(family, tmp_path):
    model = family_model(family)
    adapter = random_adapter(model, "a")
    card = dataclasses.replace(adapter.card, description="d", base="b", licence="mit")
    write_adapter(dataclasses.replace(adapter, card=card), model.config, tmp_path / "a.gguf")
    again = read_adapter(tmp_path / "a.gguf", model.config)
    assert again.card == card
    assert again.digest == peft.digest(adapter.pairs)


@pytest.mark.parametrize(("kind", "error"), [("f16", 2**-11), ("bf16", 2**-8)])
def test_half_precision_rounds_once(kind, error, tmp_path):
    model = family_model("llama")
    adapter = random_adapter(model, "a")
    write_adapter(adapter, model.config, tmp_path / "a.gguf", kind=kind)
    again = read_adapter(tmp_path / "a.gguf", model.config)
    for layer, pair in adapter.pairs.items():
        assert ((again.pairs[layer].b - pair.b).abs() <= error * pair.b.abs() + 1e-7).all()


@pytest.mark.parametrize("value", [1e6, float("inf"), float("nan")])
def test_numbers_that_a_precision_cannot_hold_are_refused(value, tmp_path):
    file = tmp_path / "t.gguf"
    entry = Entry("wide", (2, 32), KINDS["f16"], lambda: torch.full((2, 32), value))
    with pytest.raises(FormatError, match=r"wide goes from .* F16 cannot hold"):
        writing.write_gguf(file, "llama", lambda writer: None, [entry])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_largest_number_of_a_precision_stays_finite(kind):
    largest = torch.full((2, 32), LIMITS[KINDS[kind]], dtype=torch.float32)
    stored = encode(largest, KINDS[kind])
    found = quants.dequantize(stored, KINDS[kind])
    assert np.isfinite(found).all()
    assert np.allclose(found, largest, rtol=0.2)


def test_an_alpha_of_another_converter_is_honoured(tmp_path):
    a, b = torch.randn(4, 32), torch.randn(48, 4)
    write_raw(tmp_path / "a.gguf", "qwen2", 12.0, {"blk.1.ffn_up": (a, b)})
    adapter = read_adapter(tmp_path / "a.gguf", family_model("qwen2").config)
    (pair,) = adapter.pairs.values()
    assert list(adapter.pairs) == ["model.layers.1.mlp.up_proj"]
    torch.testing.assert_close(pair.delta(), 3 * b @ a)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_names_are_those_of_the_gguf_package(family):
    plan = layout(family_model(family).config)
    archs = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}
    names = get_tensor_name_map(archs[plan.family.architecture], plan.num_blocks)
    assert isinstance(archs[plan.family.architecture], MODEL_ARCH)
    for inside, own in plan.family.inside.items():
        layer = f"{plan.family.blocks}.1.{inside}"
        assert plan.name(layer) == names.get_name(layer) == f"blk.1.{own}"
        assert plan.layer(f"blk.1.{own}") == layer
    for outside in plan.family.outside.keys() - {"lm_head"}:
        assert plan.name(outside) == names.get_name(outside)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 8), st.integers(1, 4), st.integers(1, 8), st.integers(1, 5))
def test_reordering_rows_is_undone(heads, groups, half, rank):
    plan = dataclasses.replace(
        layout(family_model("llama").config), num_heads=heads * groups, num_kv_heads=heads
    )
    for name, count in (("blk.0.attn_q", heads * groups), ("blk.0.attn_k", heads)):
        rows = torch.arange(count * 2 * half * rank).reshape(-1, rank)
        moved = plan.reorder(name, rows)
        assert torch.equal(plan.restore(name, moved), rows)
        assert torch.equal(moved[1], rows[half]), "the first pair is of the two halves' first"
    assert torch.equal(plan.reorder("blk.0.attn_v", rows), rows)


def test_what_has_no_place_is_refused_and_nothing_written(tmp_path):
    model = family_model("llama", tie_word_embeddings=True)
    file = tmp_path / "a.gguf"
    dora = random_adapter(model, "a", dora=True)
    with pytest.raises(FormatError, match="is a DoRA"):
        write_adapter(dora, model.config, file)
    output = with_pairs(dora, {"lm_head": Pair(torch.ones(1, 32), torch.ones(SIZE, 1))})
    with pytest.raises(FormatError, match="lm_head has no tensor of its own"):
        write_adapter(output, model.config, file)
    deep = with_pairs(
        dora, {"model.layers.2.mlp.up_proj": Pair(torch.ones(1, 32), torch.ones(48, 1))}
    )
    with pytest.raises(FormatError, match="2 blocks"):
        write_adapter(deep, model.config, file)
    with pytest.raises(FormatError, match="No GGUF layout is known for opt"):
        write_adapter(dora, family_model("opt").config, file)
    with pytest.raises(FormatError, match="not 'q4_0'"):
        write_adapter(random_adapter(model, "a"), model.config, file, kind="q4_0")
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_not_such_an_adapter_are_refused(tmp_path):
    config = family_model("llama").config
    good, odd = (torch.ones(2, 32), torch.ones(32, 2)), (torch.ones(3, 32), torch.ones(32, 2))
    cases = {
        "gemma2": ("gemma2", 0.0, {"blk.0.attn_q": good}, "is for a gemma2 base"),
        "shapes": ("llama", 0.0, {"blk.0.attn_q": odd}, r"A \[3, 32\] and B \[32, 2\]"),
        "name": ("llama", 0.0, {"blk.0.attn_qkv": good}, "is no tensor of this llama base"),
        "block": ("llama", 0.0, {"blk.2.attn_q": good}, r"blk.2.attn_q .* \(2 blocks\)"),
        "empty": ("llama", 0.0, {}, "holds no update"),
        "nan": ("llama", 0.0, {"blk.0.attn_q": (good[0] * torch.nan, good[1])}, "NaN"),
    }
    for name, (architecture, alpha, pairs, message) in cases.items():
        write_raw(tmp_path / name, architecture, alpha, pairs)
        with pytest.raises(FormatError, match=message):
            read_adapter(tmp_path / name, config)
    whole = (tmp_path / "shapes").read_bytes()
    for name, data in {"short": whole[:60], "none": b"", "text": b"hello"}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(FormatError, match="not a whole GGUF file"):
            read_adapter(tmp_path / name, config)
    with pytest.raises(FormatError, match="does not exist"):
        read_adapter(tmp_path / "nowhere", config)
    with pytest.raises(FormatError, match=r"is model \(no LoRA\)"):
        read_adapter(write_gguf(family_model("llama"), tmp_path), config)


def with_pairs(adapter, pairs):
    return dataclasses.replace(adapter, pairs=pairs)


def write_raw(file, architecture, alpha, pairs):
    """As another program might."""
    writer = GGUFWriter(file, architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    for name, (a, b) in pairs.items():
        writer.add_tensor(f"{name}.weight.lora_a", a.numpy())
        writer.add_tensor(f"{name}.weight.lora_b", b.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
