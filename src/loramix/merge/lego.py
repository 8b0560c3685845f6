"""LoRA-LEGO: the rank-one units of all adapters, clustered, and one unit per cluster."""

from __future__ import annotations

import torch
from torch import Tensor

from loramix.errors import MergeError
from loramix.lora import Pair
from loramix.merge.core import Core
from loramix.merge.cores import TINY
from loramix.merge.registry import on_factors
from loramix.merge.updates import Updates

ROUNDS = 100


@on_factors("lora-lego", source="https://arxiv.org/abs/2409.16167")
def lora_lego(updates: Updates, *, rank: float = 0) -> Pair:
    """Cluster the rank-one units of all adapters into `rank` new ones (0: the largest rank).

    Units are the singular ones of each weighted update, both halves as large as each other.
    Clusters are found by k-means on [a; b], in which a unit and its negative are one, as b a and
    (-b)(-a) are; it starts from units far apart, so nothing is drawn at random. A centroid is made
    as long as its members are on average, and all are scaled by the square root of units per
    cluster, so that the variance of the output is kept.
    """
    if rank < 0 or rank != int(rank):
        raise MergeError(f"rank is {rank:g}; expected a whole number, or 0 for the largest rank.")
    core = Core.of(updates, "lora-lego")
    units = _units(core, updates.weights.double())
    count = int(rank) or max(pair.rank for pair in updates.present)
    centroids = _clustered(units, min(count, len(units)))
    p = core.to_b.shape[1]
    b = core.b @ (core.to_b @ centroids[:, :p].T).to(core.b.dtype)
    return Pair((centroids[:, p:] @ core.to_a).to(core.a.dtype) @ core.a, b)


def _units(core: Core, weights: Tensor) -> Tensor:
    """[R, P + Q]: the halves of each unit in core coordinates, where distances are as outside."""
    units = []
    for each, weight in zip(core.cores, weights, strict=True):
        u, s, vt = torch.linalg.svd(each * weight, full_matrices=False)
        live = s > TINY * s[0].clamp(min=1e-300)
        root = s[live].sqrt()
        units.append(torch.cat([(u[:, live] * root).T, root[:, None] * vt[live]], dim=1))
    return torch.cat(units)


def _clustered(units: Tensor, count: int) -> Tensor:
    """The reweighted centroids, [count, P + Q]."""
    if count == len(units):
        return units
    centres, owner = units[_spread(units, count)], None
    for _ in range(ROUNDS):
        along = units @ centres.T
        distance = centres.square().sum(1) - 2 * along.abs()  # of u or of -u, whichever is closer
        nearest = distance.argmin(1)
        if owner is not None and torch.equal(nearest, owner):
            break
        owner = nearest
        signed = units * along.gather(1, owner[:, None]).sign()
        centres = torch.stack([signed[owner == n].mean(0) for n in range(count)])
    lengths = torch.stack([units[owner == n].norm(dim=1).mean() for n in range(count)])
    stretch: Tensor = lengths / centres.norm(dim=1).clamp(min=1e-300)
    reweighted: Tensor = centres * stretch[:, None] * (len(units) / count) ** 0.25
    return reweighted


def _spread(units: Tensor, count: int) -> list[int]:
    """Where k-means starts: the largest unit, then the one farthest from all that were taken."""
    sizes = units.square().sum(1)
    taken = [int(sizes.argmax())]
    apart = torch.full_like(sizes, torch.inf)
    while len(taken) < count:
        along = (units @ units[taken[-1]]).abs()
        apart = torch.minimum(apart, sizes + sizes[taken[-1]] - 2 * along)
        apart[taken] = -torch.inf
        taken.append(int(apart.argmax()))
    return taken
