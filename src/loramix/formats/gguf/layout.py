"""What a base's tensors are called in a GGUF file, and in which order their rows stand there.

    model.layers.3.self_attn.q_proj.weight   <->   blk.3.attn_q.weight

llama.cpp rotates neighbouring pairs of a head's features where transformers rotates its halves
against each other, so the rows of q and k of a Llama change places; an update's `b` has the same
rows and changes with them. The other families are rotated as in transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from loramix.errors import FormatError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_ATTENTION = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
}
_MLP = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
_FUSED = {
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_GPT2 = {
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
_TWO_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
_FOUR_NORMS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_HEAD_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_OUTSIDE = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_OUTSIDE_GPT2 = {
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
    "lm_head": "output",
}


@dataclass(frozen=True, slots=True)
class Family:
    """Models that llama.cpp computes with one graph; names of tensors without ".weight"."""

    architecture: str  # general.architecture
    inside: Mapping[str, str]  # of one block, by transformers' name
    outside: Mapping[str, str] = field(default_factory=lambda: _OUTSIDE)
    blocks: str = "model.layers"
    paired_rows: bool = False  # q and k are rotated in neighbouring pairs
    norm_offset: float = 0.0  # a norm of Gemma multiplies by 1 + its weight
    transposed: bool = False  # a Conv1D's weight is [D, O]


_GEMMA = {**_ATTENTION, **_MLP, **_FOUR_NORMS}
_LLAMA = Family("llama", {**_ATTENTION, **_MLP, **_TWO_NORMS}, paired_rows=True)
FAMILIES: Mapping[str, Family] = {  # by transformers' model_type
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Family("qwen2", {**_ATTENTION, **_MLP, **_TWO_NORMS}),
    "qwen3": Family("qwen3", {**_ATTENTION, **_MLP, **_TWO_NORMS, **_HEAD_NORMS}),
    "gemma2": Family("gemma2", _GEMMA, norm_offset=1.0),
    "gemma3_text": Family("gemma3", {**_GEMMA, **_HEAD_NORMS}, norm_offset=1.0),
    "phi3": Family("phi3", {**_FUSED, **_TWO_NORMS}),
    "gpt2": Family(
        "gpt2",
        {**_GPT2, "ln_1": "attn_norm", "ln_2": "ffn_norm"},
        outside=_OUTSIDE_GPT2,
        blocks="transformer.h",
        transposed=True,
    ),
}


@dataclass(frozen=True, slots=True)
class Layout:
    """The tensors of one base, both ways."""

    family: Family
    num_blocks: int
    num_heads: int
    num_kv_heads: int
    tied: bool  # the output layer is the embedding, and has no tensor of its own

    def name(self, layer: str) -> str:
        """GGUF's name of a layer, "blk.3.attn_q"; FormatError if this base has none such."""
        block, _, inside = layer.removeprefix(f"{self.family.blocks}.").partition(".")
        if layer.startswith(f"{self.family.blocks}.") and inside in self.family.inside:
            if block.isdecimal() and int(block) < self.num_blocks:
                return f"blk.{block}.{self.family.inside[inside]}"
        elif layer in self.family.outside and not (layer == "lm_head" and self.tied):
            return self.family.outside[layer]
        raise FormatError(
            f"{layer} has no tensor of its own in a GGUF file of this {self.family.architecture} "
            f"base ({self.num_blocks} blocks); take it out of the adapter, or check the base."
        )

    def layer(self, name: str) -> str:
        """The layer that GGUF calls `name`; FormatError if this base has none such."""
        block, _, inside = name.removeprefix("blk.").partition(".")
        layers = [own for own, theirs in self.family.outside.items() if theirs == name]
        if name.startswith("blk."):
            inner = [own for own, theirs in self.family.inside.items() if theirs == inside]
            layers = [f"{self.family.blocks}.{block}.{own}" for own in inner]
        for layer in layers:
            with suppress(FormatError):  # a block it has not, an output layer that is tied
                self.name(layer)
                return layer
        raise FormatError(
            f"{name} is no tensor of this {self.family.architecture} base ({self.num_blocks} "
            f"blocks); give the base this GGUF file was made for."
        )

    def reorder(self, name: str, rows: Tensor) -> Tensor:
        """Rows [O, ...] of GGUF's tensor `name`, from transformers' order into GGUF's."""
        heads = self._rotated_heads(name)
        if not heads:
            return rows
        self._check_heads(name, rows, heads)
        halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
        return halves.transpose(1, 2).reshape(rows.shape)

    def restore(self, name: str, rows: Tensor) -> Tensor:
        """The inverse of `reorder`."""
        heads = self._rotated_heads(name)
        if not heads:
            return rows
        self._check_heads(name, rows, heads)
        pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
        return pairs.transpose(1, 2).reshape(rows.shape)

    def _rotated_heads(self, name: str) -> int:
        if not self.family.paired_rows:
            return 0
        heads = {"attn_q": self.num_heads, "attn_k": self.num_kv_heads}
        return heads.get(name.rpartition(".")[2], 0)

    def _check_heads(self, name: str, rows: Tensor, heads: int) -> None:
        if len(rows) % (2 * heads):
            raise FormatError(
                f"{name} has {len(rows)} rows, which do not divide into {heads} heads; give the "
                f"base it was trained on."
            )


def layout(config: PreTrainedConfig) -> Layout:
    """How a base of this config lies in GGUF. FormatError names a family not known here."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise FormatError(
            f"No GGUF layout is known for {config.model_type}; known: {', '.join(FAMILIES)}."
        )
    heads = config.num_attention_heads
    return Layout(
        family=family,
        num_blocks=config.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        tied=bool(getattr(config, "tie_word_embeddings", False)),
    )
