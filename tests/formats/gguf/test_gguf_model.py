"""Whole models in GGUF, computed by llama.cpp itself: the logits are transformers' own."""

from __future__ import annotations

import pytest
import torch
from gguf import GGUFReader, quants
from safetensors.torch import load_file, save_file

import loramix
from loramix.engine import Sampling
from loramix.errors import AdapterError, FormatError
from loramix.formats.checkpoint import open_checkpoint, open_tokenizer
from loramix.formats.gguf.adapter import write_adapter
from loramix.formats.gguf.model import write_model
from loramix.mix import Mix
from tests.formats.gguf.families import (
    FAMILIES,
    TOKENS,
    TOLERANCE,
    family_model,
    logprobs,
    save,
    write_gguf,
)
from tests.formats.gguf.llamacpp import LlamaCpp
from tests.tiny import tiny_tokenizer

SIZE = len(tiny_tokenizer())
THETA = {"rope_theta": 10000.0}
LLAMA3 = THETA | {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
GEMMA3 = {
    "sliding_attention": THETA | {"rope_type": "default"},
    "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
}
VARIANTS = [
    *((family, {}) for family in FAMILIES),
    ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    ("llama", {"rope_parameters": THETA | {"rope_type": "linear", "factor": 4.0}}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}),
    ("llama", {"head_dim": 16}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("gemma3_text", {"rope_parameters": GEMMA3}),
    ("phi3", {"rope_parameters": THETA | {"partial_rotary_factor": 0.5}}),
    ("phi3", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
]


@pytest.mark.parametrize(("family", "changes"), VARIANTS, ids=str)
def test_llama_cpp_computes_the_logits_of_transformers(family, changes, tmp_path):
    model = family_model(family, **changes)
    theirs = LlamaCpp(write_gguf(model, tmp_path)).next_logprobs(TOKENS, SIZE)
    torch.testing.assert_close(theirs, logprobs(model), atol=TOLERANCE[family], rtol=0)


# Largest error of each kind: of the value itself, or of the largest of 32 in a row, whose scale is
# in half precision. Four bits reach from -8 to 7, so one sign of the largest loses a whole step.
STEPS = {"f16": 2**-11, "bf16": 2**-8, "q8_0": 1.13 / 254, "q4_0": 1.01 / 8}
BLOCKS = {"q8_0": 32, "q4_0": 32}


@pytest.mark.parametrize("kind", STEPS)
def test_weights_are_rounded_once(kind, tmp_path):
    model = family_model("qwen3", hidden_size=64, intermediate_size=96)
    reader = GGUFReader(write_gguf(model, tmp_path, kind))
    found = {t.name: (t.tensor_type.name.lower(), t) for t in reader.tensors}
    chosen, tensor = found["blk.0.ffn_up.weight"]
    weight = model.model.layers[0].mlp.up_proj.weight
    got = torch.from_numpy(quants.dequantize(tensor.data, tensor.tensor_type).copy())
    size = weight.abs()
    if kind in BLOCKS:
        blocks = weight.abs().reshape(len(weight), -1, 32).amax(-1, keepdim=True)
        size = blocks.expand(-1, -1, 32).reshape(weight.shape)
    assert chosen == kind
    assert ((got - weight).abs() <= size * STEPS[kind] + 1e-7).all()
    assert found["blk.0.attn_norm.weight"][0] == "f32"
    assert found["token_embd.weight"][0] == ("q8_0" if kind == "q4_0" else kind)


@pytest.mark.parametrize(("kind", "error"), [("f16", 0.01), ("bf16", 0.05), ("q8_0", 0.1)])
def test_llama_cpp_reads_every_kind(kind, error, tmp_path):
    model = family_model("llama", hidden_size=64, intermediate_size=96)
    theirs = LlamaCpp(write_gguf(model, tmp_path, kind)).next_logprobs(TOKENS, SIZE)
    assert (theirs - logprobs(model)).abs().max() < error


def test_four_bits_answer_alike(tmp_path):
    model = family_model("llama", hidden_size=64, intermediate_size=96)
    theirs = LlamaCpp(write_gguf(model, tmp_path, "q4_0")).next_logprobs(TOKENS, SIZE)
    ours = logprobs(model)
    divergence = (ours.exp() * (ours - theirs)).sum()
    other = logprobs(family_model("llama", seed=1, hidden_size=64, intermediate_size=96))
    assert divergence < 0.1 * (ours.exp() * (ours - other)).sum()


def test_rows_that_make_no_blocks_are_kept_in_half_precision(tmp_path):
    file = write_gguf(family_model("llama", hidden_size=32, intermediate_size=48), tmp_path, "q8_0")
    kinds = {t.name: t.tensor_type.name for t in GGUFReader(file).tensors}
    assert kinds["blk.0.ffn_down.weight"] == "F16"
    assert kinds["blk.0.ffn_up.weight"] == "Q8_0"


def test_a_window_that_llama_cpp_has_not_limits_the_context(tmp_path):
    model = family_model("mistral", sliding_window=6)
    said = []
    checkpoint = open_checkpoint(str(save(model, tmp_path / "model")))
    write_model(checkpoint, tiny_tokenizer(), tmp_path / "m.gguf", kind="f32", tell=said.append)
    assert GGUFReader(tmp_path / "m.gguf").fields["llama.context_length"].contents() == 6
    assert "last 6 tokens" in said[0]
    theirs = LlamaCpp(tmp_path / "m.gguf").next_logprobs(TOKENS[:5], SIZE)
    torch.testing.assert_close(theirs, logprobs(model, TOKENS[:5]), atol=2e-5, rtol=0)


def test_the_names_of_the_first_gpt2_files(tmp_path):
    model = family_model("gpt2")
    folder = save(model, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    old = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    old |= {"h.0.attn.bias": torch.ones(1, 1, 4, 4)}
    save_file(old, folder / "model.safetensors", {"format": "pt"})
    write_model(open_checkpoint(str(folder)), tiny_tokenizer(), tmp_path / "m.gguf", kind="f32")
    theirs = LlamaCpp(tmp_path / "m.gguf").next_logprobs(TOKENS, SIZE)
    torch.testing.assert_close(theirs, logprobs(model), atol=5e-3, rtol=0)


def test_a_model_in_shards(tmp_path):
    model = family_model("llama")
    model.save_pretrained(tmp_path / "model", max_shard_size="20kB")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model" / "model.safetensors").exists()
    file = tmp_path / "m.gguf"
    write_model(open_checkpoint(str(tmp_path / "model")), tiny_tokenizer(), file, kind="f32")
    assert file.read_bytes() == write_gguf(model, tmp_path / "whole").read_bytes()


REFUSED = [
    ("qwen3", {"attention_bias": True}, "attention_bias is True"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ("llama", {"rope_parameters": THETA | {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
    ("gemma2", {"query_pre_attn_scalar": 16}, "query_pre_attn_scalar is 16"),
    ("gemma2", {"layer_types": ["full_attention"] * 2}, "layer_types is"),
    ("gpt_neox", {}, "No GGUF layout is known for gpt_neox; known: llama, mistral"),
]


@pytest.mark.parametrize(("family", "changes", "message"), REFUSED, ids=str)
def test_what_llama_cpp_computes_otherwise_is_refused(family, changes, message, tmp_path):
    model = family_model(family, **changes)
    with pytest.raises(FormatError, match=message):
        write_gguf(model, tmp_path)
    assert not (tmp_path / "model.gguf").exists()


def test_tensors_that_are_missing_or_unknown_are_named(tmp_path):
    folder = save(family_model("llama"), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    norm = tensors.pop("model.norm.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(FormatError, match="lacks 1 layers"):
        write_model(open_checkpoint(str(folder)), tiny_tokenizer(), tmp_path / "m.gguf")
    tensors |= {"model.norm.weight": norm, "model.layers.0.mlp.extra.weight": norm.clone()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(FormatError, match=r"mlp\.extra has no tensor of its own"):
        write_model(open_checkpoint(str(folder)), tiny_tokenizer(), tmp_path / "m.gguf")


def test_an_existing_file_is_left_alone(tmp_path):
    file = write_gguf(family_model("llama"), tmp_path)
    before = file.read_bytes()
    with pytest.raises(AdapterError, match="exists"):
        write_model(open_checkpoint(str(tmp_path / "model")), tiny_tokenizer(), file)
    with pytest.raises(FormatError, match="Unknown GGUF type 'q6_k'"):
        write_model(
            open_checkpoint(str(tmp_path / "model")), tiny_tokenizer(), tmp_path / "x", kind="q6_k"
        )
    assert file.read_bytes() == before


MIXES = {"my card was stolen": "banking", "what is 12 plus 30?": "math:0.8+sentiment:-0.2"}


def test_pocket_answers_in_llama_cpp_as_here(tmp_path):
    """Greedily, under a mix, with the adapters apart as llama.cpp mixes them."""
    lm = loramix.open("pocket")
    names = lm.library.names()
    checkpoint = open_checkpoint("pocket")
    tokenizer = open_tokenizer(checkpoint.folder)
    write_model(checkpoint, tokenizer, tmp_path / "pocket.gguf", kind="f32")
    for name in names:
        write_adapter(lm.library.load(name), checkpoint.config, tmp_path / f"{name}.gguf")
    files = [tmp_path / f"{name}.gguf" for name in names]
    theirs = LlamaCpp(tmp_path / "pocket.gguf", files, context=512)
    for query, mix in MIXES.items():
        ours = lm.ask(query, mix, sampling=Sampling(temperature=0, max_tokens=24)).text
        chat = [{"role": "user", "content": query}]
        tokens = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        scales = {names.index(name): weight for name, weight in Mix.parse(mix).items()}
        answer = theirs.complete(tokens, scales, max_tokens=24)
        assert ours
        assert answer["choices"][0]["text"] == ours
    lm.close()
