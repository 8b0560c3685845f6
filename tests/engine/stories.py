"""The real 260K-parameter story model, read from llama2.c's files into transformers' Llama."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from loramix.base import Base, fingerprint


def stories_base(folder: Path) -> Base:
    model = read_model(folder / "stories260K.bin")
    return Base("stories260K", model, read_tokenizer(folder / "tok512.bin"), fingerprint(model))


def read_model(file: Path) -> LlamaForCausalLM:
    """llama2.c version 0: seven int32, then float32 matrices, all layers of a kind together."""
    raw = file.read_bytes()
    dim, hidden, layers, heads, kv_heads, vocab, length = struct.unpack("7i", raw[:28])
    floats = torch.from_numpy(np.frombuffer(raw, np.float32, offset=28).copy())
    kv_dim = dim // heads * kv_heads
    shapes = {
        "embed_tokens": (vocab, dim),
        "input_layernorm": (layers, dim),
        "self_attn.q_proj": (layers, dim, dim),
        "self_attn.k_proj": (layers, kv_dim, dim),
        "self_attn.v_proj": (layers, kv_dim, dim),
        "self_attn.o_proj": (layers, dim, dim),
        "post_attention_layernorm": (layers, dim),
        "mlp.gate_proj": (layers, hidden, dim),
        "mlp.down_proj": (layers, dim, hidden),
        "mlp.up_proj": (layers, hidden, dim),
        "norm": (dim,),
    }
    state = {}
    for name, shape in shapes.items():
        tensor, floats = floats[: np.prod(shape)].view(shape), floats[np.prod(shape) :]
        if len(shape) < 2 or name == "embed_tokens":
            state[f"model.{name}.weight"] = tensor
            continue
        for layer, weight in enumerate(tensor):
            if name.endswith(("q_proj", "k_proj")):
                weight = split_halves(weight, dim // heads)
            state[f"model.layers.{layer}.{name}.weight"] = weight
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab,
            hidden_size=dim,
            intermediate_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=length,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=1,  # a story ends where the next one would begin
        )
    )
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert missing == ["lm_head.weight"]
    assert not unexpected
    model.tie_weights()
    return model.eval()


def split_halves(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of neighbouring pairs (llama2.c's rotation) to rows of two halves (transformers')."""
    out, width = weight.shape
    return weight.view(-1, head_dim // 2, 2, width).transpose(1, 2).reshape(out, width)


def read_tokenizer(file: Path) -> PreTrainedTokenizerFast:
    """llama2.c's vocabulary: pieces with scores; a better score merges first."""
    raw, pieces, at = file.read_bytes(), [], 4
    while at < len(raw):
        score, length = struct.unpack_from("fi", raw, at)
        pieces.append((raw[at + 8 : at + 8 + length].decode().replace(" ", "\u2581"), score))
        at += 8 + length
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    names += [piece for piece, _ in pieces[len(names) :]]
    vocab = {name: i for i, name in enumerate(names)}
    merges = [
        (piece[:cut], piece[cut:])
        for piece, _ in sorted(pieces[259:], key=lambda piece: -piece[1])
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    bpe = models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(names[:3])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
