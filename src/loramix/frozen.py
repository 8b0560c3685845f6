"""A frozen base's matrices in the form in which this CPU multiplies them fastest.

A step reads all of a model, so it is as fast as the matrices come from memory. Where the function
of tiles.py can be had, every matrix is packed as oneDNN packs it: our function reads this form
for few rows, at the speed of memory, and oneDNN for many.

Elsewhere torch has a product of one row that reads a plain matrix of 16-bit floats faster than
oneDNN a packed one, if it is not diverted to oneDNN. For several rows there is only oneDNN, which
lays a plain matrix out anew in every product; laid out once, it is read a half faster. So the
layers of a model that serves one request are plain, those of a busy one are packed, and
`FrozenLayers` turns them, some at a step. No number changes: either form gives the other back bit
for bit.
"""

from __future__ import annotations

import ctypes
from collections import Counter

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loramix.linear import children, matrix_of
from loramix.norms import FrozenNorm, frozen_norm
from loramix.tiles import MOST_ROWS, Tiler, Tiles

PATIENCE = 8  # steps of one request before the layers are laid out for one
TURNED_AT_ONCE = 28  # layers in a step; all of a small model in seven
TYPICAL_ROWS = 8  # oneDNN is told how many rows to expect; what it chooses hardly depends on them
SIXTEEN_BITS = (torch.bfloat16, torch.float16)
BLOCK = 64  # rows that oneDNN lays side by side, two numbers of each in turn
SAMPLE = 99  # rows that are compared before this layout is believed


def packed(matrix: Tensor) -> Tensor:
    """A matrix [O, D] as oneDNN reads it; a copy."""
    laid_out: Tensor = torch.ops.mkldnn._reorder_linear_weight(matrix.contiguous(), TYPICAL_ROWS)
    return laid_out


def can_pack(matrix: Tensor) -> bool:
    """Whether oneDNN multiplies by a packed matrix of this kind on this CPU."""
    if matrix.device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if matrix.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if matrix.dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return False


def product(x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply x [.., D] by the transpose of a matrix [O, D], packed or plain: [.., O]."""
    if matrix.is_mkldnn:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x.contiguous(), matrix, bias, "none", [], "")
        return y
    one_row = x.numel() == x.shape[-1] and x.dtype in SIXTEEN_BITS and x.is_cpu
    if not one_row or not torch._C._get_mkldnn_enabled():
        return F.linear(x, matrix, bias)
    torch._C._set_mkldnn_enabled(False)
    try:
        return F.linear(x.contiguous(), matrix, bias)
    finally:
        torch._C._set_mkldnn_enabled(True)


class FrozenLinear(nn.Module):
    """An `nn.Linear` or `Conv1D` of 16-bit floats on the CPU, for inference only.

    The layer itself is kept aside without its matrix, unless that is another layer's too.
    """

    def __init__(
        self, layer: nn.Linear | Conv1D, *, shared: bool, tiler: Tiler | None = None
    ) -> None:
        super().__init__()
        self.matrix = matrix_of(layer).detach()
        self.out_features, self.in_features = self.matrix.shape
        self.bias = layer.bias
        self.marker = nn.Parameter(self.matrix.new_empty(0), requires_grad=False)  # dtype, device
        # What reads its rows, if tied; in a tuple, because it is a part of the model elsewhere.
        self.lookup: tuple[FrozenEmbedding, ...] = ()
        self.woven: Tensor | None = None  # a view of the packed matrix, if it can be read
        self.for_few: Tiles | None = None  # the same, if our function is to multiply few rows
        self._tiler = tiler
        self._shared = shared
        self._aside = (layer,)
        self._original: tuple[Tensor, ...] = (layer.weight,)  # until it is let go
        del layer.weight

    @property
    def weight(self) -> Tensor:
        """The plain matrix [O, D]; made anew at every call while it is packed."""
        return self.matrix.to_dense() if self.is_packed else self.matrix

    @property
    def is_packed(self) -> bool:
        return self.matrix.is_mkldnn

    def turn(self) -> None:
        """From plain to packed, or back."""
        plain, to_pack = self.weight, not self.is_packed
        self.matrix = packed(plain) if to_pack else plain
        self.woven = woven_tiles(plain, self.matrix) if to_pack else None
        if self._tiler:
            self.for_few = None if self.woven is None else self._tiler.woven(self.woven)
        for embedding in self.lookup:
            embedding.plain = plain if self.woven is None else None
        if not self._shared:
            self._original = ()

    def forward(self, x: Tensor) -> Tensor:  # [.., D] -> [.., O]
        if tiles := self.suiting(x):
            return tiles.product(x, self.bias)
        return product(x, self.matrix, self.bias)

    def suiting(self, x: Tensor) -> Tiles | None:
        """The matrix for our function, if that is to multiply these rows."""
        few = x.numel() <= MOST_ROWS * self.in_features and x.dtype == self.matrix.dtype
        return self.for_few if few else None

    def restored(self) -> nn.Linear | Conv1D:
        """The layer as it was; this one must not be used afterwards."""
        (layer,) = self._aside
        if not self._original:
            dense = self.weight.T.contiguous() if isinstance(layer, Conv1D) else self.weight
            self._original = (nn.Parameter(dense, requires_grad=False),)
        (layer.weight,) = self._original
        self.woven = self.for_few = None
        self.matrix, self.lookup = matrix_of(layer).detach(), ()  # the packed one is let go
        return layer


class FrozenEmbedding(nn.Module):
    """An `nn.Embedding` that reads its rows out of the output layer it is tied to.

    A plain copy beside a packed one would cost a quarter of a small model's memory.
    """

    def __init__(self, layer: nn.Embedding, tied: FrozenLinear) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = tied.out_features, tied.in_features
        self.tied = (tied,)
        self.plain: Tensor | None = tied.matrix  # None while the packed one can be read
        self._aside = (layer,)
        tied.lookup = (self,)
        del layer.weight

    @property
    def weight(self) -> Tensor:
        """The plain matrix [V, D]; made anew at every call while it is packed."""
        return self.tied[0].weight

    def forward(self, ids: Tensor) -> Tensor:  # [..] -> [.., D]
        (tied,) = self.tied
        if self.plain is not None:
            return F.embedding(ids, self.plain)
        assert tied.woven is not None
        return read_rows(tied.woven, ids)

    def restored(self) -> nn.Embedding:
        """The layer as it was, tied to the output layer, which is restored first."""
        (layer,), (tied,) = self._aside, self.tied
        layer.weight = tied.restored().weight
        return layer


def woven_tiles(matrix: Tensor, laid_out: Tensor) -> Tensor | None:
    """The packed form of a matrix [O, D] as a view [O / 64, D / 2, 64, 2], if that is its layout.

    oneDNN does not promise it, so some rows are compared; None if it cannot be read like this.
    """
    rows, width = matrix.shape
    if rows % BLOCK or width % 2 or torch.ops.mkldnn._nbytes(laid_out) != matrix.nbytes:
        return None
    numbers = (ctypes.c_int16 * matrix.numel()).from_address(torch.ops.mkldnn.data_ptr(laid_out))
    tiles = torch.frombuffer(numbers, dtype=matrix.dtype).view(rows // BLOCK, width // 2, BLOCK, 2)
    sample = torch.linspace(0, rows - 1, SAMPLE).long()
    return tiles if torch.equal(read_rows(tiles, sample), matrix[sample]) else None


def read_rows(tiles: Tensor, ids: Tensor) -> Tensor:
    """Rows [.., D] of the matrix that lies in these tiles."""
    return tiles[ids // BLOCK, :, ids % BLOCK].flatten(-2)


Frozen = FrozenLinear | FrozenEmbedding | FrozenNorm


class FrozenLayers:
    """The layers of a frozen model that are taken over in place: linear ones that can be packed.

    With a tiler, norms too.
    """

    def __init__(self, model: nn.Module, tiler: Tiler | None = None) -> None:
        self._steps_alone = 0
        self._taken: list[tuple[nn.Module, str, Frozen]] = []
        self.layers: list[FrozenLinear] = []
        owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
        embeddings = {
            id(layer.weight): (owner, name, layer)
            for owner, name, layer in children(model, nn.Embedding)
            if layer.max_norm is None  # it only looks rows up
        }
        for owner, name, layer in children(model, nn.Linear, Conv1D):
            weight = getattr(layer, "weight", None)
            if weight is None or not can_pack(weight):  # none: the same layer is elsewhere too
                continue
            tied = embeddings.get(id(weight)) if owners[id(weight)] == 2 else None
            shared = owners[id(weight)] > 1 and tied is None
            frozen = FrozenLinear(layer, shared=shared, tiler=tiler)
            self._take(owner, name, frozen)
            self.layers.append(frozen)
            if tied:
                self._take(tied[0], tied[1], FrozenEmbedding(tied[2], frozen))
            if tiler:
                frozen.turn()
        if tiler:
            for owner, name, layer in _norms(model):
                if norm := frozen_norm(layer, tiler.native):
                    self._take(owner, name, norm)

    def suit(self, num_requests: int) -> None:
        """Before a step: turn some layers, if most steps are of another kind by now."""
        self._steps_alone = self._steps_alone + 1 if num_requests == 1 else 0
        if 0 < self._steps_alone < PATIENCE:
            return
        to_pack = self._steps_alone == 0
        turning = [one for one in self.layers if one.is_packed != to_pack and not one.for_few]
        for layer in turning[:TURNED_AT_ONCE]:
            layer.turn()

    def release(self) -> None:
        """Put the model's own layers back, one by one: memory never holds two models."""
        self.layers.clear()
        while self._taken:
            owner, name, layer = self._taken.pop()
            setattr(owner, name, layer.restored())

    def _take(self, owner: nn.Module, name: str, frozen: Frozen) -> None:
        self._taken.append((owner, name, frozen))
        setattr(owner, name, frozen)


def _norms(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """(owner, name, layer) of what may be a norm."""
    return [
        (owner, name, layer)
        for owner in model.modules()
        for name, layer in owner.named_children()
        if "norm" in name
    ]
