"""Methods on singular vectors: exact on R by R cores, for any ranks, the result of low rank."""

from __future__ import annotations

import torch
from torch import Tensor

from loramix.merge.registry import check_share, on_cores

TINY = 1e-9  # singular values of a core below this share of the largest are zeros
CORE = "https://arxiv.org/abs/2509.17786"


@on_cores("core-sum", source=CORE)
def core_sum(cores: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum, taken in core space: `sum`, with the rank it has and balanced factors."""
    return torch.einsum("k,kpq->pq", weights, cores)


@on_cores("core-tsv", source=CORE)
@on_cores("tsv-m", source="https://arxiv.org/abs/2412.00081")
def tsv_m(cores: Tensor, weights: Tensor, *, density: float = 1.0) -> Tensor:
    """Task singular vectors: all updates' singular vectors, made orthogonal to one another.

    The share `density` of each update's own ranks is kept; the U's and the V's of all are stacked
    and replaced by the closest orthonormal ones (the polar factor), so that tasks do not interfere.
    Rotations of all updates change nothing in it, so in core space it is the same method.
    """
    check_share("density", density)
    parts = [_leading(core * weight, density) for core, weight in zip(cores, weights, strict=True)]
    u = torch.cat([part[0] for part in parts], dim=1)
    s = torch.cat([part[1] for part in parts])
    v = torch.cat([part[2] for part in parts], dim=1)
    return _polar(u) * s @ _polar(v).T


@on_cores("iso-c", source="https://arxiv.org/abs/2502.04959")
def iso_c(cores: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum with all its singular values set to their mean.

    The mean is over the values that are not zero: the sum of low-rank updates has few of them, and
    the directions outside stay untouched. One update is not itself, but isotropic.
    """
    u, s, vt = torch.linalg.svd(core_sum(cores, weights), full_matrices=False)
    live = s > TINY * s[0]
    return (u[:, live] * s[live].mean()) @ vt[live] if live.any() else torch.zeros_like(cores[0])


def _leading(core: Tensor, density: float) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular triplets U [P, r], S [r], V [Q, r] of one update."""
    u, s, vt = torch.linalg.svd(core, full_matrices=False)
    rank = int((s > TINY * s[0]).sum()) if s[0] > 0 else 0
    keep = round(density * rank)
    return u[:, :keep], s[:keep], vt[:keep].T


def _polar(x: Tensor) -> Tensor:
    """The closest matrix with orthonormal columns (rows, if it is wide)."""
    u, _, vt = torch.linalg.svd(x, full_matrices=False)
    closest: Tensor = u @ vt
    return closest
