"""A frozen base's matrices in the form in which this machine multiplies them fastest.

On the CPU, torch lays a bfloat16 matrix out anew for every product, which costs as much memory
traffic as the product itself. A frozen matrix can be laid out once: `PackedLinear` holds it as
oneDNN's kernel reads it, with bitwise equal results. The plain matrix is let go meanwhile and is
made again from the packed one, bit for bit, when the model is given back.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

TILE = 64  # rows that oneDNN lays side by side, two numbers of each in turn
SAMPLE = 99  # rows that are compared before this layout is believed
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

    The layer itself is kept aside without its matrix, unless that is another layer's too.
    """

    def __init__(self, plain: nn.Linear | Conv1D, *, shared: bool = False) -> None:
        super().__init__()
        matrix = plain.weight.T if isinstance(plain, Conv1D) else plain.weight
        self.out_features, self.in_features = matrix.shape
        self.bias = plain.bias
        self.packed = packed(matrix)
        self.shared = plain.weight if shared else None
        self._aside = (plain,)  # in a tuple, so it is not a part of the model
        del plain.weight

    @property
    def weight(self) -> Tensor:
        """The plain matrix [O, D], made anew at every call."""
        dense: Tensor = self.packed.to_dense()
        return dense

    def forward(self, x: Tensor) -> Tensor:  # [.., D] -> [.., O]
        return product(x, self.packed, self.bias)

    def plain(self) -> nn.Linear | Conv1D:
        """The layer as it was; this one must not be used afterwards."""
        (layer,) = self._aside
        if self.shared is None:
            dense = self.weight.T.contiguous() if isinstance(layer, Conv1D) else self.weight
            layer.weight = nn.Parameter(dense, requires_grad=False)
        else:
            layer.weight = self.shared
        return layer


class PackedEmbedding(nn.Module):
    """An `nn.Embedding` that reads its rows out of the packed output layer it is tied to.

    A plain copy beside the packed one would cost a quarter of a small model's memory.
    """

    def __init__(self, plain: nn.Embedding, tied: PackedLinear, tiles: Tensor) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = tied.out_features, tied.in_features
        self.tied = (tied,)  # in a tuple: it is a part of the model elsewhere
        self._tiles = tiles
        self._aside = (plain,)
        del plain.weight

    @property
    def weight(self) -> Tensor:
        """The plain matrix [V, D], made anew at every call."""
        return self.tied[0].weight

    def forward(self, ids: Tensor) -> Tensor:  # [..] -> [.., D]
        return read_rows(self._tiles, ids)

    def plain(self) -> nn.Embedding:
        """The layer as it was; the output layer has the same matrix when it is unpacked next."""
        (layer,), (tied,) = self._aside, self.tied
        tied.shared = layer.weight = nn.Parameter(self.weight, requires_grad=False)
        return layer


def tiles_of(matrix: Tensor, laid_out: Tensor) -> Tensor | None:
    """The packed form of a matrix [O, D] as a view [O / 64, D / 2, 64, 2], if that is its layout.

    oneDNN does not promise it, so some rows are compared; None if it cannot be read like this.
    """
    rows, width = matrix.shape
    if laid_out.layout != torch._mkldnn or rows % TILE or width % 2:  # type: ignore[attr-defined]
        return None
    if torch.ops.mkldnn._nbytes(laid_out) != matrix.nbytes:
        return None
    numbers = (ctypes.c_int16 * matrix.numel()).from_address(torch.ops.mkldnn.data_ptr(laid_out))
    tiles = torch.frombuffer(numbers, dtype=matrix.dtype).view(rows // TILE, width // 2, TILE, 2)
    sample = torch.linspace(0, rows - 1, SAMPLE).long()
    return tiles if torch.equal(read_rows(tiles, sample), matrix[sample]) else None


def read_rows(tiles: Tensor, ids: Tensor) -> Tensor:
    """Rows [.., D] of the matrix that lies in these tiles."""
    return tiles[ids // TILE, :, ids % TILE].flatten(-2)


def pack(model: nn.Module) -> None:
    """Pack the linear layers of a frozen model, in place, where that is faster."""
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    embeddings = {
        id(found.weight): (owner, name, found) for owner, name, found in _embeddings(model)
    }
    for owner, name, layer in _children(model, (nn.Linear, Conv1D)):
        weight = layer.weight
        if not can_pack(weight):
            continue
        replacement = PackedLinear(layer, shared=owners[id(weight)] > 1)
        setattr(owner, name, replacement)
        tied = embeddings.get(id(weight)) if owners[id(weight)] == 2 else None
        tiles = tiles_of(weight, replacement.packed) if tied else None
        if tied and tiles is not None:
            setattr(tied[0], tied[1], PackedEmbedding(tied[2], replacement, tiles))
            replacement.shared = None


def unpack(model: nn.Module) -> None:
    """Put plain layers back, in place."""
    for kind in (PackedEmbedding, PackedLinear):  # an embedding first: it shares its matrix
        for owner, name, layer in _children(model, (kind,)):
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


def _embeddings(model: nn.Module) -> list[tuple[nn.Module, str, nn.Embedding]]:
    """Those that only look rows up: no limit to their norm, none that is scaled."""
    found = _children(model, (nn.Embedding,))
    return [(owner, name, layer) for owner, name, layer in found if layer.max_norm is None]


def _children(model: nn.Module, kinds: tuple[type, ...]) -> list[tuple[nn.Module, str, Any]]:
    """(owner, name, layer) of every layer of exactly these kinds."""
    return [
        (owner, name, layer)
        for owner in model.modules()
        for name, layer in owner.named_children()
        if type(layer) in kinds
    ]
