"""A tiny random model of every family that has a GGUF layout, on disk as transformers saves it."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import PreTrainedModel

from loramix.formats.checkpoint import open_checkpoint
from loramix.formats.gguf.model import write_model
from tests import tiny

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt2")
TOKENS = (7, 40, 90, 33, 120, 65, 8, 200, 77, 13, 101)
_ROPE = {"rope_theta": 10000.0}
CHANGES: dict[str, dict[str, object]] = {
    "mistral": {"sliding_window": None},
    "gemma2": tiny.CONFIGS["llama"]
    | {
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 8,
    },
    "gemma3_text": {"num_hidden_layers": 7, "layer_types": None},
}
# llama.cpp looks GELU up in a table of half precision
TOLERANCE = dict.fromkeys(FAMILIES, 2e-5) | dict.fromkeys(("gemma2", "gemma3_text", "gpt2"), 5e-3)


def family_model(family: str, **changes: object) -> PreTrainedModel:
    with patch.dict(tiny.CONFIGS, {"gemma2": CHANGES["gemma2"]}):
        return tiny.tiny_model(family, **(CHANGES.get(family, {}) | changes))


def save(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    tiny.tiny_tokenizer().save_pretrained(folder)
    return folder


def write_gguf(model: PreTrainedModel, place: Path, kind: str = "f32") -> Path:
    """The model as transformers saves it, and from there as a GGUF file."""
    folder = save(model, place / "model")
    file = place / "model.gguf"
    write_model(open_checkpoint(str(folder)), tiny.tiny_tokenizer(), file, kind=kind)
    return file


def logprobs(model: PreTrainedModel, tokens: tuple[int, ...] = TOKENS) -> Tensor:
    """[V], float64, of the token after `tokens`, by transformers."""
    logits = model(torch.tensor([tokens])).logits
    return logits[0, -1].double().log_softmax(-1)
