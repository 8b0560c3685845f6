"""The algebra of low-rank updates: pure functions on tensors, no files and no models.

Shapes use one letter each, here and in mixed.py:

    N  rows of a batch      T  tokens of a row      D  input features      O  output features
    K  adapters present     R  rank                 [O, D] means "O by D"
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from loramix.errors import AdapterError


@dataclass(frozen=True, slots=True)
class Pair:
    """One low-rank update dW = b @ a.

    The LoRA scale (alpha / r, or alpha / sqrt(r) for rsLoRA) is multiplied into `b` when the file
    is read, so past `formats` no code knows that alpha exists.

    With a `magnitude` it is a DoRA update (https://arxiv.org/abs/2402.09353), which depends on the
    base matrix W it is bound to:  dW = magnitude * (W + b @ a) / |W + b @ a| - W, the norm taken
    over each output row.
    """

    a: Tensor  # [R, D]
    b: Tensor  # [O, R]
    magnitude: Tensor | None = None  # [O]

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def delta(self, weight: Tensor | None = None) -> Tensor:
        """dW, [O, D]; a DoRA update needs the base `weight` [O, D] it applies to."""
        plain = self.b @ self.a
        if self.magnitude is None:
            return plain
        if weight is None:
            raise AdapterError("A DoRA update depends on the base weight; give it to delta().")
        return dora_gain(self, weight)[:, None] * (weight + plain) - weight

    def to(self, dtype: torch.dtype, device: torch.device | str | None = None) -> Pair:
        moved = self.magnitude if self.magnitude is None else self.magnitude.to(device, dtype)
        return Pair(self.a.to(device, dtype), self.b.to(device, dtype), moved)


def size_bytes(pairs: Iterable[Pair], dtype: torch.dtype | None = None) -> int:
    """Of all tensors, in `dtype` or their own precision."""
    tensors = [tensor for pair in pairs for tensor in (pair.a, pair.b, pair.magnitude)]
    return sum(t.numel() * (dtype or t.dtype).itemsize for t in tensors if t is not None)


def dora_gain(pair: Pair, weight: Tensor) -> Tensor:
    """The gain magnitude / |W + b @ a| of each output, [O], in float32, W the pristine weight."""
    assert pair.magnitude is not None
    adapted = weight.float() + pair.b.float() @ pair.a.float()
    gain: Tensor = pair.magnitude.float() / torch.linalg.vector_norm(adapted, dim=1)
    return gain


def stack(terms: Iterable[tuple[float, Pair]]) -> Pair:
    """The weighted sum of updates as one pair: exact, with the ranks added up.

        sum_i w_i b_i a_i  =  [w_1 b_1 | ... | w_k b_k] @ [a_1 ; ... ; a_k]

    Averaging the a's and the b's separately is a different thing: it adds cross terms b_i a_j.
    PEFT's "linear" does that and LoRAX's merge does too; `test_lora.py` holds the counterexample.
    """
    terms = list(terms)
    if not terms:
        raise AdapterError("Nothing to stack: a mix of no adapters has no pair.")
    if any(pair.magnitude is not None for _, pair in terms):
        raise AdapterError("A DoRA update is not a sum of factors; fold it into its base instead.")
    a = torch.cat([pair.a for _, pair in terms])
    b = torch.cat([weight * pair.b for weight, pair in terms], dim=1)
    return Pair(a, b)


def compress(pair: Pair, rank: int) -> Pair:
    """The closest pair of at most this rank, in Frobenius norm (Eckart & Young 1936).

    Two QR factorisations reduce the SVD from [O, D] to [R, R]; dW is never built.
    """
    if rank < 1:
        raise AdapterError(f"Cannot compress to rank {rank}; a rank is at least 1.")
    qb, rb = torch.linalg.qr(pair.b)  # [O, R] [R, R]
    qa, ra = torch.linalg.qr(pair.a.T)  # [D, R] [R, R]
    u, s, vt = torch.linalg.svd(rb @ ra.T)
    root = s[:rank].sqrt()
    return Pair(a=root[:, None] * (vt[:rank] @ qa.T), b=(qb @ u[:, :rank]) * root)
