"""The numbers beside the tensors: what a config of transformers is in the keys of a GGUF file.

llama.cpp knows each family by a fixed graph. A config that asks for another activation, another
scale of the queries or another pattern of windows would be computed wrongly, so it is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from gguf import GGUFWriter, RopeScalingType
from torch import Tensor

from loramix.errors import FormatError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

ACTIVATIONS = {"gemma2": "gelu_pytorch_tanh", "gemma3_text": "gelu_pytorch_tanh"}
BIASED = ("llama", "mistral", "qwen2", "phi3")  # the graphs that add the biases of q, k, v
GEMMA2_PERIOD, GEMMA3_PERIOD = 2, 6  # every so many-th layer sees everything


def describe_model(
    writer: GGUFWriter, config: PreTrainedConfig, tell: Callable[[str], None]
) -> None:
    """Everything but the tokenizer. Raises FormatError for what llama.cpp computes otherwise."""
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    if config.model_type == "gpt2":
        _gpt2(writer, config)
    else:
        _rotary(writer, config, tell)


def _gpt2(writer: GGUFWriter, config: PreTrainedConfig) -> None:
    _require(config, "activation_function", "gelu_new")
    _require(config, "scale_attn_weights", True)
    _require(config, "scale_attn_by_inverse_layer_idx", False)
    writer.add_context_length(config.n_positions)
    writer.add_feed_forward_length(config.n_inner or 4 * config.hidden_size)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)


def _rotary(writer: GGUFWriter, config: PreTrainedConfig, tell: Callable[[str], None]) -> None:
    kind = config.model_type
    key = "hidden_activation" if kind in ACTIVATIONS else "hidden_act"
    _require(config, key, ACTIVATIONS.get(kind, "silu"))
    if config.model_type not in BIASED:
        _require(config, "attention_bias", False)
    size = head_size(config)
    writer.add_context_length(_context(config, tell))
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(size)
    writer.add_value_length(size)
    _rope(writer, config, size)
    if kind.startswith("gemma"):
        _gemma(writer, config, size)


def head_size(config: PreTrainedConfig) -> int:
    """Features of one head."""
    given = getattr(config, "head_dim", None)
    return int(given or config.hidden_size // config.num_attention_heads)


def _context(config: PreTrainedConfig, tell: Callable[[str], None]) -> int:
    """The longest context that llama.cpp computes as transformers does.

    Of these families it has windows for Gemma alone.
    """
    longest: int = config.max_position_embeddings
    window = getattr(config, "sliding_window", None)
    used = getattr(config, "use_sliding_window", True) and not config.model_type.startswith("gemma")
    if not window or not used or window >= longest:
        return longest
    tell(
        f"llama.cpp does not limit attention to the last {window} tokens as this model does; the "
        f"context is set to {window}, within which both are equal."
    )
    return int(window)


def _gemma(writer: GGUFWriter, config: PreTrainedConfig, size: int) -> None:
    """Windows, and scores capped by tanh."""
    period = GEMMA2_PERIOD if config.model_type == "gemma2" else GEMMA3_PERIOD
    expected = ["sliding_attention", "full_attention"]
    pattern = [expected[(n + 1) % period == 0] for n in range(config.num_hidden_layers)]
    _require(config, "layer_types", pattern)
    # llama.cpp knows the largest ones by their number of layers and scales their queries otherwise
    largest = config.num_hidden_layers == (46 if config.model_type == "gemma2" else 62)
    scale = config.hidden_size // config.num_attention_heads if largest else size
    _require(config, "query_pre_attn_scalar", scale)
    writer.add_sliding_window(config.sliding_window)
    if config.model_type == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    else:
        _require(config, "attn_logit_softcapping", None)
        _require(config, "final_logit_softcapping", None)


def _rope(writer: GGUFWriter, config: PreTrainedConfig, size: int) -> None:
    rope = _full_rope(config)
    share = rope.get("partial_rotary_factor", 1.0)
    writer.add_rope_dimension_count(int(size * share))
    writer.add_rope_freq_base(rope["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind not in ("default", "llama3"):
        raise FormatError(
            f"rope_type is {kind!r}; a GGUF file of ours holds default, linear or llama3."
        )


def _full_rope(config: PreTrainedConfig) -> dict[str, Any]:
    """How layers rotate that see everything; Gemma 3 has other numbers for the rest."""
    rope: dict[str, Any] = config.rope_parameters
    if "full_attention" not in rope:
        return rope
    near = rope["sliding_attention"]
    if (near.get("rope_type"), near["rope_theta"]) != ("default", 10_000.0):
        raise FormatError(
            f"Layers with a window rotate by {near}; llama.cpp knows a base of 10000 alone."
        )
    full: dict[str, Any] = rope["full_attention"]
    return full


def rope_factors(config: PreTrainedConfig) -> Tensor | None:
    """By how much Llama 3.1 slows each frequency down, [size / 2]; None for other models."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "llama3":
        return None
    size = head_size(config)
    steps = torch.arange(0, size, 2, dtype=torch.float64) / size
    waves = 2 * math.pi * rope["rope_theta"] ** steps  # tokens a turn takes
    turns = rope["original_max_position_embeddings"] / waves
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    slowed: Tensor = 1 / ((1 - smooth) / rope["factor"] + smooth)
    return slowed.float()


def _require(config: PreTrainedConfig, key: str, expected: object) -> None:
    found = getattr(config, key, None)
    if found != expected:
        raise FormatError(
            f"{key} is {found!r}; llama.cpp computes {config.model_type} with {expected!r} alone."
        )
