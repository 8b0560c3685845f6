"""Updates as small square cores: all that a few low-rank updates are, without the large matrices.

With the B's and A's of all updates side by side, [O, R] and [R, D], and their thin SVDs

    B = U_B S_B W_B^T    A = W_A S_A V_A^T    dW_i = U_B C_i V_A^T   C_i = (S_B W_B^T)_i (W_A S_A)_i

each C_i is at most [R, R], and whatever is invariant under rotations (norms, angles, singular
values, the SVD itself) is the same for C_i as for dW_i. It is the core space of
https://arxiv.org/abs/2509.17786, lossless for any ranks. Both SVDs come from R by R Gram matrices
in float64, which is exact to the precision of float32 factors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from loramix.errors import MergeError
from loramix.lora import Pair
from loramix.merge.rows import Combine, View
from loramix.merge.updates import Updates

TINY = 1e-7  # singular values below this share of the largest are float32's noise
SPARE, SWEEPS = 8, 2  # extra columns and rounds of the subspace iteration


@dataclass(frozen=True, slots=True)
class Core:
    """The cores of K updates and the way back: U_B = b @ to_b, V_A^T = to_a @ a."""

    cores: Tensor  # [K, R_B, R_A], float64
    b: Tensor  # [O, R]
    a: Tensor  # [R, D]
    to_b: Tensor  # [R, R_B]
    to_a: Tensor  # [R_A, R]

    @classmethod
    def of(cls, updates: Updates, method: str) -> Core:
        b, a, places = updates.factors(method)
        left, to_b = _halves(b.double().T @ b.double())
        right, to_a = _halves(a.double() @ a.double().T)
        cores = torch.stack([left[:, place] @ right.T[place] for place in places])
        return cls(cores, b, a, to_b, to_a.T)

    def pair(self, core: Tensor) -> Pair:
        """U_B core V_A^T with the square roots of the singular values on both sides."""
        return self.truncated(core, WHOLE)[0]

    def truncated(self, core: Tensor, size: Size) -> tuple[Pair, float]:
        """The closest pair of a smaller rank (Eckart & Young 1936), and the energy it keeps."""
        u, s, vt = torch.linalg.svd(core, full_matrices=False)
        rank = size.rank_of(s)
        root = s[:rank].sqrt()
        b = self.b @ (self.to_b @ (u[:, :rank] * root)).to(self.b.dtype)
        a = (root[:, None] * vt[:rank] @ self.to_a).to(self.a.dtype) @ self.a
        return Pair(a, b), _share(s[:rank].square().sum(), s.square().sum())


@dataclass(frozen=True, slots=True)
class Size:
    """How large a merged pair may be: at most `rank`, or the least that keeps `energy`.

    The energy is the share of the squared Frobenius norm. Neither: what has any.
    """

    rank: int | None = None
    energy: float | None = None

    def __post_init__(self) -> None:
        if self.rank is not None and self.energy is not None:
            raise MergeError("Give a rank or an energy, not both.")
        if self.rank is not None and self.rank < 1:
            raise MergeError(f"Cannot merge to rank {self.rank}; a rank is at least 1.")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise MergeError(
                f"Cannot keep {self.energy:g} of the energy; expected 0 < energy <= 1."
            )

    @property
    def is_bound(self) -> bool:
        return self.rank is not None or self.energy is not None

    def rank_of(self, singular: Tensor) -> int:
        """For singular values in falling order."""
        live = max(1, int((singular > TINY * singular[0]).sum())) if len(singular) else 1
        if self.energy is not None:
            kept = singular.square().cumsum(0) / singular.square().sum().clamp(min=1e-300)
            return min(live, 1 + int((kept < self.energy - 1e-12).sum()))
        return min(live, self.rank or live)


WHOLE = Size()


def resized(pair: Pair, size: Size) -> tuple[Pair, float]:
    """A pair at another size, and the energy it keeps; MergeError for a DoRA, which has none."""
    if not size.is_bound:
        return pair, 1.0
    if pair.magnitude is not None:
        raise MergeError(
            "A DoRA update has no rank to compress without its base; turn the adapter into a plain "
            "LoRA first: loramix convert ADAPTER OUT --base BASE --rank R."
        )
    core = Core.of(Updates("", ("",), torch.ones(1), (pair,)), "svd")
    return core.truncated(core.cores[0], size)


def approximated(view: View, combine: Combine, size: Size, rank: int) -> tuple[Pair, float]:
    """The best pair of at most `rank` for an update that has no factors, and the energy it keeps.

    Subspace iteration over blocks of rows (Halko, Martinsson & Tropp 2011): exact where `rank` and
    a few spare columns span the update, within a fraction of a percent of the SVD elsewhere. Each
    sweep reads every row once.
    """
    rows, width = view.shape
    columns = min(rank + SPARE, rows, width)
    generator = torch.Generator().manual_seed(view.seed)
    basis = torch.randn(width, columns, generator=generator)
    for _ in range(SWEEPS):
        basis = torch.linalg.qr(basis).Q
        grown = torch.zeros(width, columns)
        for block in view.blocks():
            merged = combine(block)
            grown.addmm_(merged.T, merged @ basis)
        basis = grown
    basis = torch.linalg.qr(basis).Q
    parts, energy = [], 0.0
    for block in view.blocks():
        merged = combine(block)
        parts.append(merged @ basis)
        energy += float(merged.square().sum(dtype=torch.double))
    found = Pair(basis.T.contiguous(), torch.cat(parts))
    pair, _ = resized(found, size if size.is_bound else Size(rank))
    kept = (pair.b.double().T @ pair.b.double() * (pair.a.double() @ pair.a.double().T)).sum()
    return pair, _share(kept, torch.tensor(energy))


def _halves(gram: Tensor) -> tuple[Tensor, Tensor]:
    """S W^T [r, R] and W / S [R, r] of G = W S^2 W^T, without what is noise beside the largest."""
    squared, w = torch.linalg.eigh(gram)
    live = squared > (squared[-1] * TINY**2).clamp(min=torch.finfo(torch.double).tiny)
    live[-1] = True
    s, w = squared[live].clamp(min=0).sqrt(), w[:, live]
    return s[:, None] * w.T, w / s.clamp(min=torch.finfo(torch.double).tiny)


def _share(part: Tensor, whole: Tensor) -> float:
    return min(1.0, float(part / whole)) if whole > 0 else 1.0
