"""The linear layers of transformers' models: `nn.Linear`, and `Conv1D`, which stores W^T."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def matrix_of(layer: Any) -> Tensor:
    """The weight as [O, D], whichever way the layer stores it."""
    weight: Tensor = layer.weight
    return weight.T if isinstance(layer, Conv1D) else weight


def shape(layer: Any) -> tuple[int, int]:
    """(O, D)"""
    if isinstance(layer, Conv1D):
        return layer.weight.shape[1], layer.weight.shape[0]
    return layer.out_features, layer.in_features


def children(model: nn.Module, *kinds: type) -> list[tuple[nn.Module, str, Any]]:
    """(owner, name, layer) of every layer of exactly these kinds."""
    return [
        (owner, name, layer)
        for owner in model.modules()
        for name, layer in owner.named_children()
        if type(layer) in kinds
    ]
