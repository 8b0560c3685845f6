"""Bases on disk to merge into, two adapters for them, and what is then in the files."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from loramix.merge.recipe import Recipe, settings_of
from loramix.mix import Mix
from tests.tiny import random_adapter

MIX = "a:0.6+b:-0.4"


def recipe(mix=MIX, method="sum", *given):
    return Recipe(Mix.parse(mix), method, settings_of(given))


def save(base, folder, dtype=torch.float32, shards="20KB"):
    base.model.to(dtype).save_pretrained(folder, max_shard_size=shards)
    base.tokenizer.save_pretrained(folder)
    base.model.float()
    return folder


def tensors(folder):
    return {k: v for file in Path(folder).glob("*.safetensors") for k, v in load_file(file).items()}


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def two(model, **options):
    return {
        "a": random_adapter(model, "a", rank=3, seed=1, **options),
        "b": random_adapter(model, "b", rank=5, seed=2, share=0.6),
    }
