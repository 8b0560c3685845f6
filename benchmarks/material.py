"""What the engine's benchmark runs on: a random model of Qwen3-0.6B's shape, and random adapters.

The same weights for everybody: a transformers model in bfloat16, PEFT folders, GGUF files.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, TokenType, quants
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from loramix.adapter import Adapter, Card
from loramix.base import Base, fingerprint
from loramix.formats import peft
from loramix.lora import Pair
from loramix.mixed import linear_shapes

SHAPE: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": None,
}
RANK = 16
GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def random_model() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)  # so it never takes the memory of float32
    try:
        model = Qwen3ForCausalLM(Qwen3Config(**SHAPE)).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def size_bytes(model: Qwen3ForCausalLM) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())


def same_weights(model: Qwen3ForCausalLM) -> Qwen3ForCausalLM:
    """Another model of the same tensors, for a peer that wraps layers of its own."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in model.parameters()})


def base_of(model: Qwen3ForCausalLM) -> Base:
    return Base("random-0.6b", model, _bytes_tokenizer(), fingerprint(model))


def random_adapter(model: Qwen3ForCausalLM, name: str, seed: int) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for layer, (out, into) in linear_shapes(model).items():
        if layer != "lm_head":
            a = torch.randn(RANK, into, generator=generator) * into**-0.5
            b = torch.randn(out, RANK, generator=generator) * 0.02
            pairs[layer] = Pair(a.bfloat16(), b.bfloat16())
    return Adapter(name, pairs, peft.digest(pairs), Card(name))


def write_gguf(model: Qwen3ForCausalLM, path: Path, kind: GGMLQuantizationType) -> None:
    """The model for llama.cpp: matrices of this kind, norms in float32, as its converter does."""
    config = model.config
    writer = GGUFWriter(path, "qwen3")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    words = [f"w{i}" for i in range(config.vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(words)
    writer.add_token_types([TokenType.NORMAL] * len(words))
    writer.add_token_merges(["w 1"])
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight":
            _add(writer, _gguf_name(name), tensor, kind)
    _finish(writer)


def write_gguf_adapter(adapter: Adapter, path: Path) -> None:
    writer = GGUFWriter(path, "qwen3")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(RANK))
    for layer, pair in adapter.pairs.items():
        name = _gguf_name(f"{layer}.weight")
        _add(writer, f"{name}.lora_a", pair.a, GGMLQuantizationType.BF16)
        _add(writer, f"{name}.lora_b", pair.b, GGMLQuantizationType.BF16)
    _finish(writer)


def _gguf_name(name: str) -> str:
    if name == "model.embed_tokens.weight":
        return "token_embd.weight"
    if name == "model.norm.weight":
        return "output_norm.weight"
    _, _, layer, rest = name.split(".", 3)
    part, _, kind = rest.rpartition(".")
    return f"blk.{layer}.{GGUF_NAMES[part]}.{kind}"


def _add(writer: GGUFWriter, name: str, tensor: torch.Tensor, kind: GGMLQuantizationType) -> None:
    if tensor.dim() == 1:
        writer.add_tensor(name, tensor.float().numpy())
    elif kind == GGMLQuantizationType.BF16:
        raw = tensor.contiguous().view(torch.uint16).numpy()
        writer.add_tensor(name, raw.view(np.uint8), raw_dtype=kind)
    else:
        writer.add_tensor(name, quants.quantize(tensor.float().numpy(), kind), raw_dtype=kind)


def _finish(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _bytes_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte; the other ids of a random model have no text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)
