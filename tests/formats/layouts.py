"""One small LoRA in every layout there is, synthesised tensor by tensor.

Each builder writes files like those found in the wild and says which updates they mean, so that
every layout is tested where there are no real files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

D, OUT, R = 6, 4, 2
LAYERS = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj")
CONFIG = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "tiny/llama",
    "bias": "none",
    "r": R,
    "lora_alpha": 3,
    "target_modules": ["q_proj", "v_proj"],
}
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:56edc3\nsize 902\n"


def factors(seed: int = 0, layers: tuple[str, ...] = LAYERS) -> dict[str, tuple[Tensor, Tensor]]:
    """(A [R, D], B [O, R]) by layer."""
    g = torch.Generator().manual_seed(seed)
    return {n: (torch.randn(R, D, generator=g), torch.randn(OUT, R, generator=g)) for n in layers}


def peft_tensors(infix: str = "") -> dict[str, Tensor]:
    """As PEFT names them; `infix` is ".default" in a state dict that was not stripped."""
    tensors = {}
    for layer, (a, b) in factors().items():
        tensors[f"base_model.model.{layer}.lora_A{infix}.weight"] = a
        tensors[f"base_model.model.{layer}.lora_B{infix}.weight"] = b
    return tensors


def folder(place: Path, tensors: Mapping[str, Tensor] | None = None, **config: Any) -> Path:
    """A PEFT folder; `config` changes its adapter_config.json."""
    place.mkdir(parents=True, exist_ok=True)
    (place / "adapter_config.json").write_text(json.dumps(CONFIG | config), "utf-8")
    tensors = peft_tensors() if tensors is None else tensors
    save_file({k: v.contiguous() for k, v in tensors.items()}, place / "adapter_model.safetensors")
    return place


def plain(place: Path) -> tuple[Path, float]:
    return folder(place), 3 / R


def rslora(place: Path) -> tuple[Path, float]:
    return folder(place, use_rslora=True), 3 / math.sqrt(R)


def unstripped(place: Path) -> tuple[Path, float]:
    """What `torch.save(get_peft_model(...).state_dict())` leaves of the adapter."""
    return folder(place, peft_tensors(".default")), 3 / R


def compiled(place: Path) -> tuple[Path, float]:
    return folder(place, {f"_orig_mod.{k}": v for k, v in peft_tensors().items()}), 3 / R


def pickled(place: Path) -> tuple[Path, float]:
    folder(place)
    (place / "adapter_model.safetensors").unlink()
    torch.save(peft_tensors(), place / "adapter_model.bin")
    return place, 3 / R


def single_file(place: Path) -> tuple[Path, float]:
    """With its config beside it."""
    return folder(place) / "adapter_model.safetensors", 3 / R


def lone_file(place: Path) -> tuple[Path, float]:
    """Without any config: alpha = r."""
    place.mkdir(parents=True)
    torch.save(peft_tensors(), place / "lone.pt")
    return place / "lone.pt", 1.0


def loralib(place: Path) -> tuple[Path, float]:
    place.mkdir(parents=True)
    pairs = factors().items()
    tensors = {f"{n}.lora_{p}": t for n, ab in pairs for p, t in zip("AB", ab, strict=True)}
    save_file(tensors, place / "lone.safetensors")
    return place / "lone.safetensors", 1.0


def minlora(place: Path) -> tuple[Path, float]:
    """Its own default is alpha = 1, and its files do not say."""
    place.mkdir(parents=True)
    stem = "parametrizations.weight.0.lora_"
    pairs = factors().items()
    tensors = {f"{n}.{stem}{p}": t for n, ab in pairs for p, t in zip("AB", ab, strict=True)}
    torch.save(tensors, place / "minlora.pt")
    return place / "minlora.pt", 1 / R


def minlora_with_config(place: Path) -> tuple[Path, float]:
    file, _ = minlora(place)
    (place / "adapter_config.json").write_text(json.dumps({"r": R, "lora_alpha": 5}), "utf-8")
    return file, 5 / R


def mlx(place: Path, **config: Any) -> tuple[Path, float]:
    place.mkdir(parents=True)
    text = {
        "model": "/Users/me/models/tiny",
        "fine_tune_type": "lora",
        "num_layers": 2,
        "learning_rate": 1e-5,
        "lora_parameters": {"rank": R, "alpha": 16, "dropout": 0.0, "scale": 10.0},
    }
    (place / "adapter_config.json").write_text(json.dumps(text | config), "utf-8")
    tensors = {}
    for layer, (a, b) in factors().items():
        tensors |= {f"{layer}.lora_a": a.T.contiguous(), f"{layer}.lora_b": b.T.contiguous()}
    save_file(tensors, place / "adapters.safetensors")
    return place, 10.0


def checkpoint(place: Path) -> tuple[Path, float]:
    """A trainer's checkpoint around the LoRA: wrapped, with full tensors and an optimizer."""
    place.mkdir(parents=True)
    full = {
        "base_model.model.model.embed_tokens.weight": torch.randn(9, D),
        "base_model.model.lm_head.weight": torch.randn(9, D),
        "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight": torch.randn(OUT, D),
    }
    tree = {
        "state_dict": {"model": full | peft_tensors(".default")},
        "optimizer": {"state": {0: {"step": torch.tensor(3)}}},
        "epoch": 3,
    }
    torch.save(tree, place / "last.ckpt")
    (place / "adapter_config.json").write_text(json.dumps(CONFIG), "utf-8")
    return place / "last.ckpt", 3 / R


EXACT = (
    plain, rslora, unstripped, compiled, pickled, single_file, lone_file, loralib, minlora,
    minlora_with_config, mlx, checkpoint,
)  # fmt: skip
