"""Tiny random models of every architecture the engine serves, and random adapters for them.

Weights are drawn so that activations keep their size from layer to layer: greedy choices are then
clear-cut, and float32 rounding cannot flip them.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.pytorch_utils import Conv1D

from loramix.adapter import Adapter, Card
from loramix.base import Base, fingerprint
from loramix.lora import Pair
from loramix.mix import Mix
from loramix.mixed import linear_shapes

MERGES = [("t", "h"), ("th", "e"), ("Ġ", "a"), ("i", "n"), ("e", "r"), ("o", "n")]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SPECIAL = ["<pad>", "<s>", "</s>", "<user>", "<assistant>", "<system>"]

_COMMON = {"max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LLAMA = _COMMON | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
CONFIGS: dict[str, dict[str, object]] = {
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA | {"head_dim": 16},
    "mistral": _LLAMA | {"sliding_window": 6},
    "gemma3_text": _LLAMA
    | {
        "num_hidden_layers": 3,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "query_pre_attn_scalar": 8,
    },
    "phi3": _LLAMA,
    "gpt2": {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "gpt_neox": _COMMON
    | {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
    "opt": _COMMON
    | {
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 32,
    },
}
ARCHITECTURES = tuple(CONFIGS)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, six merges, a chat template: characters outside ASCII take several tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*SPECIAL, *letters, *("".join(pair) for pair in MERGES)]
    bpe = models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=MERGES)
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    fast.chat_template = TEMPLATE
    return fast


def tiny_model(architecture: str = "llama", seed: int = 0, **changes: object) -> PreTrainedModel:
    """A float32 model of about 20 thousand parameters; `changes` go to its config."""
    options = CONFIGS[architecture] | {"vocab_size": len(tiny_tokenizer())} | changes
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **options))
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1:
            parameter.data.add_(0.1 * noise)
        else:
            parameter.data.copy_(noise * parameter.shape[-1] ** -0.5)
    return model.eval().requires_grad_(False)


def tiny_base(architecture: str = "llama", seed: int = 0, **changes: object) -> Base:
    model = tiny_model(architecture, seed, **changes)
    return Base(f"tiny-{architecture}", model, tiny_tokenizer(), fingerprint(model))


def random_adapter(
    model: PreTrainedModel,
    name: str,
    *,
    rank: int = 3,
    seed: int = 0,
    share: float = 1.0,
    dora: bool = False,
) -> Adapter:
    """Updates about half as large as the base weights, on a random `share` of the linear layers."""
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for layer, (out, width) in linear_shapes(model).items():
        if layer == "lm_head" or torch.rand((), generator=generator) > share:
            continue
        a = torch.randn(rank, width, generator=generator) * width**-0.5
        b = torch.randn(out, rank, generator=generator) * 0.5 * rank**-0.5
        magnitude = torch.rand(out, generator=generator) + 0.5 if dora else None
        pairs[layer] = Pair(a, b, magnitude)
    digest = hashlib.sha256(f"{name}{rank}{seed}{share}{dora}".encode()).hexdigest()
    return Adapter(name=name, pairs=pairs, digest=digest, card=Card(name))


def folded(model: PreTrainedModel, mix: Mix, adapters: Mapping[str, Adapter]) -> PreTrainedModel:
    """A copy of the model with the mix in its weights: the reference every engine must equal."""
    copied = copy.deepcopy(model)
    for name, weight in mix.items():
        for layer, pair in adapters[name].pairs.items():
            pristine = model.get_submodule(layer).weight
            target = copied.get_submodule(layer)
            if isinstance(target, Conv1D):
                target.weight.data += weight * pair.delta(pristine.T).T
            else:
                target.weight.data += weight * pair.delta(pristine)
    return copied
