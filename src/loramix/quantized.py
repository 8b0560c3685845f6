"""A base's matrices in eight or four bits a number: a half or a quarter of bfloat16's memory.

int8 has a scale for each output; nf4 is QLoRA's NormalFloat, whose scales of 64 numbers each are
rounded too (https://arxiv.org/abs/2305.14314), by bitsandbytes. Only weights are rounded,
activations are not, and adapters add their exact deltas on top, or are learned on top. The output
layer and what is tied to it stay as they are: they decide between tokens. On a CPU this saves
memory, not time (`docs/log.md` compares with torchao and bitsandbytes).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loramix.errors import BaseError
from loramix.linear import children, matrix_of

LEVELS = 127  # of either sign
GROUP = 64  # numbers that share a scale in four bits
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
        if torch.is_grad_enabled() and x.requires_grad:
            y = _Product.apply(rows, self)  # type: ignore[no-untyped-call]
        elif few and not torch.is_grad_enabled():
            y = torch._weight_int8pack_mm(rows, self.quantized, self.scale)
        elif x.dtype == torch.float16:  # the product before scaling would pass 65504
            y = F.linear(rows, self.weight)
        else:
            y = F.linear(rows, self.quantized.to(x.dtype)) * self.scale
        y = y if self.bias is None else y + self.bias
        whole: Tensor = y.view(*x.shape[:-1], self.out_features)
        return whole


class _Product(torch.autograd.Function):
    """x W^T whose W is widened again for the gradient: kept, it would cost what rounding saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Int8Linear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.weight.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ ctx.layer.weight.to(grads[0].dtype), None


class Nf4Linear(nn.Module):
    """An `nn.Linear` or `Conv1D` with a frozen matrix of bitsandbytes' four bits."""

    quantized: Tensor  # [O * D / 2, 1], two numbers a byte

    def __init__(self, layer: nn.Linear | Conv1D) -> None:
        super().__init__()
        exact = matrix_of(layer).detach().contiguous()
        self.out_features, self.in_features = exact.shape
        self.bias = layer.bias
        packed, self.state = _bitsandbytes().functional.quantize_4bit(
            exact, quant_type="nf4", compress_statistics=True
        )
        self.register_buffer("quantized", packed)

    @property
    def weight(self) -> Tensor:
        """The rounded matrix [O, D], made anew at every call."""
        whole: Tensor = _bitsandbytes().functional.dequantize_4bit(self.quantized, self.state)
        return whole

    def forward(self, x: Tensor) -> Tensor:  # [.., D] -> [.., O]
        y: Tensor = _bitsandbytes().matmul_4bit(
            x, self.quantized, quant_state=self.state, bias=self.bias
        )
        return y


def quantize(model: Any, kind: str = "int8") -> None:
    """Round the linear layers of a frozen transformers model, in place, but its output layer.

    Raises BaseError for nf4 if bitsandbytes is missing, or gets a layer's numbers wrong.
    """
    rounded = {"int8": Int8Linear, "nf4": Nf4Linear}[kind]
    head = model.get_output_embeddings()
    layers = [found for found in children(model, nn.Linear, Conv1D) if found[2] is not head]
    if kind == "nf4":
        _check_widths([layer for _, _, layer in layers])
    for owner, name, layer in layers:
        setattr(owner, name, rounded(layer))


def _check_widths(layers: Sequence[nn.Linear | Conv1D]) -> None:
    """BaseError for rows that are not whole groups: bitsandbytes 0.50 gets them wrong."""
    widths = {matrix_of(layer).shape[1] for layer in layers}
    if odd := sorted(width for width in widths if width % GROUP):
        raise BaseError(
            f"Four bits need layers of a multiple of {GROUP} inputs, and this base has some of "
            f"{odd[0]}; quantise to int8."
        )


def _bitsandbytes() -> Any:
    logging.getLogger("bitsandbytes").setLevel(
        logging.ERROR
    )  # it misses a kernel it can do without
    try:
        import bitsandbytes
    except ImportError as error:
        raise BaseError(
            "Four bits need bitsandbytes; `pip install 'loramix[quant]'`, or quantise to int8."
        ) from error
    return bitsandbytes
