"""A base's matrices in eight bits each, with a scale for each output: half the memory of bfloat16.

Only weights are rounded, activations are not, and adapters add their exact deltas on top. The
output layer and what is tied to it stay as they are: they decide between tokens. On a CPU this
saves memory, not time (`docs/log.md` compares with torchao and bitsandbytes).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loramix.linear import children, matrix_of

LEVELS = 127  # of either sign
FEW_ROWS = 4  # up to so many, torch's kernel that reads int8 is faster than widening first


class Int8Linear(nn.Module):
    """An `nn.Linear` or `Conv1D` with a frozen int8 matrix: y = (q x) * scale + bias."""

    quantized: Tensor  # [O, D], int8
    scale: Tensor  # [O], in the activations' precision

    def __init__(self, layer: nn.Linear | Conv1D) -> None:
        super().__init__()
        exact = matrix_of(layer).detach()
        self.out_features, self.in_features = exact.shape
        self.bias = layer.bias
        largest = exact.abs().amax(dim=1, keepdim=True).float()
        scale = (largest / LEVELS).clamp(min=torch.finfo(torch.float32).tiny).to(exact.dtype)
        rounded = (exact.float() / scale.float()).round().clamp(-LEVELS, LEVELS)
        self.register_buffer("quantized", rounded.to(torch.int8))
        self.register_buffer("scale", scale.squeeze(1))

    @property
    def weight(self) -> Tensor:
        """The rounded matrix [O, D], made anew at every call."""
        return self.quantized.to(self.scale.dtype) * self.scale[:, None]

    def forward(self, x: Tensor) -> Tensor:  # [.., D] -> [.., O]
        rows = x.reshape(-1, self.in_features)
        few = len(rows) <= FEW_ROWS and x.is_cpu and x.dtype == torch.bfloat16
        if few and not torch.is_grad_enabled():
            y = torch._weight_int8pack_mm(rows, self.quantized, self.scale)
        elif x.dtype == torch.float16:  # the product before scaling would pass 65504
            y = F.linear(rows, self.weight)
        else:
            y = F.linear(rows, self.quantized.to(x.dtype)) * self.scale
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], self.out_features)


def quantize(model: Any) -> None:
    """Round the linear layers of a frozen transformers model, in place, but its output layer."""
    head = model.get_output_embeddings()
    for owner, name, layer in children(model, nn.Linear, Conv1D):
        if layer is not head:
            setattr(owner, name, Int8Linear(layer))
