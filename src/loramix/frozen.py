"""A frozen base's matrices in the form in which this machine multiplies them fastest.

On the CPU, torch lays a bfloat16 matrix out anew for every product, which costs as much memory
traffic as the product itself. A frozen matrix can be laid out once: `PackedLinear` holds it as
oneDNN's kernel reads it, with bitwise equal results. The plain matrix is let go meanwhile and is
made again from the packed one, bit for bit, when the model is given back.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

TYPICAL_ROWS = 8  # oneDNN is told how many rows to expect; what it chooses hardly depends on them


def packed(matrix: Tensor) -> Tensor:
    """A matrix [O, D] as `product` multiplies by it fastest; a copy, or the matrix itself."""
    if not can_pack(matrix):
        return matrix
    laid_out: Tensor = torch.ops.mkldnn._reorder_linear_weight(
        matrix.detach().contiguous(), TYPICAL_ROWS
    )
    return laid_out


def product(x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply x [.., D] by the transpose of a matrix [O, D], packed or plain: [.., O]."""
    if matrix.layout != torch._mkldnn:  # type: ignore[attr-defined]
        return F.linear(x, matrix, bias)
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x.contiguous(), matrix, bias, "none", [], "")
    return y


class PackedLinear(nn.Module):
    """An `nn.Linear` or `Conv1D` of 16-bit floats on the CPU, for inference only.

    The layer itself is kept aside without its matrix, unless that is tied to another layer's.
    """

    def __init__(self, plain: nn.Linear | Conv1D, *, tied: bool) -> None:
        super().__init__()
        matrix = plain.weight.T if isinstance(plain, Conv1D) else plain.weight
        self.out_features, self.in_features = matrix.shape
        self.bias = plain.bias
        self._packed = packed(matrix)
        self._tied = plain.weight if tied else None
        self._aside = (plain,)  # in a tuple, so it is not a part of the model
        del plain.weight

    @property
    def weight(self) -> Tensor:
        """The plain matrix [O, D], made anew at every call."""
        dense: Tensor = self._packed.to_dense()
        return dense

    def forward(self, x: Tensor) -> Tensor:  # [.., D] -> [.., O]
        return product(x, self._packed, self.bias)

    def plain(self) -> nn.Linear | Conv1D:
        """The layer as it was; this one must not be used afterwards."""
        (layer,) = self._aside
        if self._tied is None:
            dense = self.weight.T.contiguous() if isinstance(layer, Conv1D) else self.weight
            layer.weight = nn.Parameter(dense, requires_grad=False)
        else:
            layer.weight = self._tied
        return layer


def pack(model: nn.Module) -> None:
    """Pack the linear layers of a frozen model, in place, where that is faster."""
    shared = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for owner, name, layer in _children(model, (nn.Linear, Conv1D)):
        if can_pack(layer.weight):
            setattr(owner, name, PackedLinear(layer, tied=shared[id(layer.weight)] > 1))


def unpack(model: nn.Module) -> None:
    """Put plain layers back, in place."""
    for owner, name, layer in _children(model, (PackedLinear,)):
        setattr(owner, name, layer.plain())


def can_pack(matrix: Tensor) -> bool:
    """Whether oneDNN multiplies by a packed matrix of this kind on this CPU."""
    if matrix.device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if matrix.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if matrix.dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return False


def _children(model: nn.Module, kinds: tuple[type, ...]) -> list[tuple[nn.Module, str, Any]]:
    """(owner, name, layer) of every layer of exactly these kinds."""
    return [
        (owner, name, layer)
        for owner in model.modules()
        for name, layer in owner.named_children()
        if type(layer) in kinds
    ]
