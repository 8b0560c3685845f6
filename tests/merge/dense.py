"""Merge methods once more, written from their papers on dense float64 matrices: the references."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor


def trim(d: Tensor, density: float) -> Tensor:
    keep = round(density * d.numel())
    if keep == 0:
        return torch.zeros_like(d)
    cut = d.abs().flatten().sort(descending=True).values[keep - 1]
    return torch.where(d.abs() >= cut, d, 0)


def elect_and_average(terms: Tensor) -> Tensor:
    """TIES, steps 2 and 3: the sign with the larger total magnitude, the mean of those entries."""
    up, down = terms.clamp(min=0).sum(0), -terms.clamp(max=0).sum(0)
    sign = torch.where(up > down, 1.0, torch.where(down > up, -1.0, 0.0))
    agree = (terms.sign() == sign) & (terms != 0)
    return (terms * agree).sum(0) / agree.sum(0).clamp(min=1)


def weighed(deltas: Tensor, weights: Tensor) -> Tensor:
    return deltas * weights[:, None, None]


def ties(deltas: Tensor, weights: Tensor, density: float) -> Tensor:
    return elect_and_average(weighed(torch.stack([trim(d, density) for d in deltas]), weights))


def ties_normalised(deltas: Tensor, weights: Tensor, density: float) -> Tensor:
    terms = weighed(torch.stack([trim(d, density) for d in deltas]), weights)
    agree = (terms.sign() == terms.sum(0).sign()) & (terms != 0)
    return (terms * agree).sum(0) / weighed(agree, weights).sum(0).clamp(min=1e-8)


def magnitude_prune(deltas: Tensor, weights: Tensor, density: float) -> Tensor:
    return weighed(torch.stack([trim(d, density) for d in deltas]), weights).sum(0)


def dare(deltas: Tensor, weights: Tensor, density: float, drawn: Tensor) -> Tensor:
    return weighed(kept_at_random(deltas, density, drawn), weights).sum(0)


def dare_ties(deltas: Tensor, weights: Tensor, density: float, drawn: Tensor) -> Tensor:
    return elect_and_average(weighed(kept_at_random(deltas, density, drawn), weights))


def kept_at_random(deltas: Tensor, density: float, drawn: Tensor) -> Tensor:
    """DARE: drop with the chance 1 - density, rescale the rest; `drawn` is uniform in [0, 1)."""
    mask = (drawn < density).double()
    return mask * deltas / density


def della(deltas: Tensor, weights: Tensor, density: float, epsilon: float, drawn: Tensor) -> Tensor:
    kept = [kept_by_rank(d, density, epsilon, u) for d, u in zip(deltas, drawn, strict=True)]
    return elect_and_average(weighed(torch.stack(kept), weights))


def della_linear(
    deltas: Tensor, weights: Tensor, density: float, epsilon: float, drawn: Tensor
) -> Tensor:
    kept = [kept_by_rank(d, density, epsilon, u) for d, u in zip(deltas, drawn, strict=True)]
    return weighed(torch.stack(kept), weights).sum(0)


def kept_by_rank(d: Tensor, density: float, epsilon: float, drawn: Tensor) -> Tensor:
    """DELLA's MAGPRUNE, entry by entry: chances in even steps by rank within the row."""
    kept = torch.zeros_like(d)
    step = 2 * epsilon / (d.shape[1] - 1)
    for row, entries in enumerate(d.tolist()):
        ranked = sorted(range(len(entries)), key=lambda column: abs(entries[column]))
        for rank, column in enumerate(ranked):
            chance = density - epsilon + step * rank
            if drawn[row, column] < chance:
                kept[row, column] = entries[column] / chance
    return kept


def breadcrumbs(deltas: Tensor, weights: Tensor, density: float, gamma: float) -> Tensor:
    def masked(d: Tensor) -> Tensor:
        order = d.abs().flatten().argsort(descending=True)
        top, keep = round(gamma * d.numel()), round((density + gamma) * d.numel())
        mask = torch.zeros(d.numel(), dtype=torch.bool)
        mask[order[top:keep]] = True
        return d * mask.view_as(d)

    return weighed(torch.stack([masked(d) for d in deltas]), weights).sum(0)


def sce(deltas: Tensor, weights: Tensor, density: float) -> Tensor:
    terms = weighed(deltas, weights)
    variance = terms.var(0, correction=0)
    chosen = terms * (trim(variance, density) > 0 if density < 1 else 1)
    energy = chosen.square().mean((1, 2))
    share = (energy / energy.sum())[:, None, None]
    agree = (chosen.sign() == chosen.sum(0).sign()) & (chosen != 0)
    return (share * chosen * agree).sum(0) / (share * agree).sum(0).clamp(min=1e-12)


def slerp(deltas: Tensor, weights: Tensor) -> Tensor:
    t = float(weights[1] / weights.sum())
    one, two = (d / d.norm() for d in deltas)
    angle = torch.acos((one * two).sum())
    return (torch.sin((1 - t) * angle) * deltas[0] + torch.sin(t * angle) * deltas[1]) / torch.sin(
        angle
    )


def karcher(deltas: Tensor, weights: Tensor) -> Tensor:
    """Walk to where the weighted logarithms cancel, on the unit sphere of matrices."""
    shares = weights / weights.sum()
    norms = deltas.flatten(1).norm(dim=1)
    points = deltas.flatten(1) / norms[:, None]
    mean = shares @ points
    mean = mean / mean.norm()
    for _ in range(200):
        angles = torch.acos((points @ mean).clamp(-1, 1))
        logs = (points - angles.cos()[:, None] * mean) * (angles / angles.sin())[:, None]
        step = shares @ logs
        if step.norm() < 1e-14:
            break
        mean = step.norm().cos() * mean + step.norm().sin() * step / step.norm()
    return (mean * (shares @ norms)).view_as(deltas[0])


def mean_direction(deltas: Tensor, weights: Tensor) -> Tensor:
    """The normalised weighted mean of directions, as long as the updates are on average."""
    shares = weights / weights.sum()
    norms = deltas.flatten(1).norm(dim=1)
    mean = weighed(deltas, shares / norms).sum(0)
    return mean / mean.norm() * (shares @ norms)


def model_stock(deltas: Tensor, weights: Tensor) -> Tensor:
    terms = weighed(deltas, weights).flatten(1)
    count = len(terms)
    cosines = [
        torch.cosine_similarity(terms[i], terms[j], dim=0)
        for i in range(count)
        for j in range(count)
        if i != j
    ]
    c = torch.stack(cosines).mean().clamp(min=0)
    t = count * c / (1 + (count - 1) * c)
    return (t * terms.mean(0)).view_as(deltas[0])


def tsv_m(deltas: Tensor, weights: Tensor, ranks: list[int]) -> Tensor:
    parts = []
    for d, rank in zip(weighed(deltas, weights), ranks, strict=True):
        u, s, vt = torch.linalg.svd(d, full_matrices=False)
        parts.append((u[:, :rank], s[:rank], vt[:rank]))

    def orthogonal(x: Tensor) -> Tensor:
        p, _, qt = torch.linalg.svd(x, full_matrices=False)
        return p @ qt

    u = orthogonal(torch.cat([p[0] for p in parts], 1))
    v = orthogonal(torch.cat([p[2] for p in parts], 0))
    return u @ torch.diag(torch.cat([p[1] for p in parts])) @ v


def iso_c(deltas: Tensor, weights: Tensor, rank: int) -> Tensor:
    u, s, vt = torch.linalg.svd(weighed(deltas, weights).sum(0), full_matrices=False)
    return s[:rank].mean() * u[:, :rank] @ vt[:rank]


def core_of(factors: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Core space: singular bases U and V^T of all B's and all A's, and each update in them."""
    u = torch.linalg.svd(torch.cat([b for b, _ in factors], 1), full_matrices=False).U
    vt = torch.linalg.svd(torch.cat([a for _, a in factors], 0), full_matrices=False).Vh
    return u, vt, torch.stack([u.T @ b @ a @ vt.T for b, a in factors])


def core_sum(factors: list[tuple[Tensor, Tensor]], weights: Tensor) -> Tensor:
    u, vt, cores = core_of(factors)
    return u @ weighed(cores, weights).sum(0) @ vt


def core_tsv(factors: list[tuple[Tensor, Tensor]], weights: Tensor, ranks: list[int]) -> Tensor:
    u, vt, cores = core_of(factors)
    return u @ tsv_m(cores, weights, ranks) @ vt


def core_ties(factors: list[tuple[Tensor, Tensor]], weights: Tensor, density: float) -> Tensor:
    u, vt, cores = core_of(factors)
    return u @ ties(cores, weights, density) @ vt


def core_dare_ties(
    factors: list[tuple[Tensor, Tensor]], weights: Tensor, density: float, drawn: Tensor
) -> Tensor:
    u, vt, cores = core_of(factors)
    return u @ dare_ties(cores, weights, density, drawn) @ vt


def aligned(deltas: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """KnOTS: the SVD of all updates side by side; U, and the part of S V^T that is each one's."""
    u, s, vt = torch.linalg.svd(torch.cat(list(deltas), 1), full_matrices=False)
    right = s[:rank, None] * vt[:rank]
    return u[:, :rank], torch.stack(right.chunk(len(deltas), 1))


def knots_ties(deltas: Tensor, weights: Tensor, density: float, rank: int) -> Tensor:
    u, parts = aligned(deltas, rank)
    return u @ ties(parts, weights, density)


def knots_dare_ties(
    deltas: Tensor, weights: Tensor, density: float, rank: int, drawn: Tensor
) -> Tensor:
    u, parts = aligned(deltas, rank)
    return u @ dare_ties(parts, weights, density, drawn)


def lora_lego(factors: list[tuple[Tensor, Tensor]], weights: Tensor, rank: int) -> Tensor:
    """LoRA-LEGO with the best of all clusterings of [a; b], sought one by one; for few units."""
    units = torch.cat(
        [units_of(weight * b @ a, len(a)) for weight, (b, a) in zip(weights, factors, strict=True)]
    )
    out = factors[0][0].shape[0]
    least, found = torch.inf, None
    for owner in product(range(rank), repeat=len(units)):
        if len(set(owner)) < rank:
            continue
        for signs in product((1.0, -1.0), repeat=len(units)):
            signed = units * torch.tensor(signs)[:, None]
            groups = [signed[torch.tensor(owner) == k] for k in range(rank)]
            cost = sum(float((group - group.mean(0)).square().sum()) for group in groups)
            if cost < least:
                least, found = cost, groups
    centroids = torch.stack(
        [g.mean(0) / g.mean(0).norm() * g.norm(dim=1).mean() for g in found or ()]
    )
    return (len(units) / rank) ** 0.5 * centroids[:, :out].T @ centroids[:, out:]


def units_of(delta: Tensor, rank: int) -> Tensor:
    """The rank-one units [b; a] of an update, halves of one length, [rank, O + D]."""
    u, s, vt = torch.linalg.svd(delta, full_matrices=False)
    root = s[:rank].sqrt()
    return torch.cat([(u[:, :rank] * root).T, root[:, None] * vt[:rank]], 1)


def regmean(
    deltas: Tensor, inputs: list[Tensor], shares: Tensor, off_diagonal: float, seen: Tensor
) -> Tensor:
    """RegMean for matrices that multiply columns, (sum W_i G_i) (sum G_i)^-1, of inputs [N_i, D].

    `seen` has the directions [D, Q], orthonormal, that inputs are looked at in.
    """
    whole = torch.zeros(deltas.shape[2], deltas.shape[2]).double()
    wanted = torch.zeros_like(deltas[0])
    for delta, x, share in zip(deltas, inputs, shares, strict=True):
        gram = x.T @ x / len(x)
        gram = off_diagonal * gram + (1 - off_diagonal) * torch.diag(gram.diag())
        gram = share * seen @ (seen.T @ gram @ seen) @ seen.T
        whole += gram
        wanted += delta @ gram
    return wanted @ torch.linalg.pinv(whole, hermitian=True)
