"""Methods that need one number per update: exact on factors, whatever the ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from loramix.errors import MergeError
from loramix.merge.registry import coefficients
from loramix.merge.updates import Updates

SMALL = 1e-12
OPPOSED = 1e-6  # unit vectors whose mean is shorter than this have none to speak of
STEPS = 100  # of Karcher's iteration; it converges in fewer than ten for acute angles


@coefficients("sum", source="https://arxiv.org/abs/2212.04089")
def weighted_sum(updates: Updates) -> Tensor:
    """sum_i w_i dW_i: what the engine serves, so merging this way changes nothing."""
    return updates.weights


@coefficients("average", source="https://arxiv.org/abs/2203.05482")
def average(updates: Updates) -> Tensor:
    """sum_i w_i dW_i / sum_i w_i: the weights are normalised to sum to one."""
    return updates.shares


@coefficients("weighted", source="https://arxiv.org/abs/2212.04089")
def weighted(updates: Updates, *, normalise: float = 0) -> Tensor:
    """The weighted sum (`sum`); with `normalise` = 1 over the sum of weights (`average`)."""
    if normalise not in (0, 1):
        raise MergeError(f"normalise is {normalise:g}; expected 0 or 1.")
    return updates.shares if normalise else updates.weights


@coefficients("slerp", source="https://dl.acm.org/doi/10.1145/325165.325242")
def slerp(updates: Updates) -> Tensor:
    """The great circle between two updates, at the second's share of the weights.

    sin((1 - t) h) / sin(h) dW_1 + sin(t h) / sin(h) dW_2 with h the angle between them. Where it is
    not defined (parallel updates, a layer only one of them has) it is the straight line.
    """
    shares = updates.shares
    if len(shares) > 2:
        raise MergeError(f"slerp is for two adapters, got {len(shares)}; use karcher for more.")
    gram = updates.gram()
    norms = gram.diagonal().clamp(min=0).sqrt()
    if len(shares) == 1 or norms.min() < SMALL:
        return shares
    angle = torch.acos((gram[0, 1] / norms.prod()).clamp(-1, 1))
    if torch.sin(angle) < 1e-6:
        return shares
    return torch.sin(shares * angle) / torch.sin(angle)


@coefficients("karcher", source="https://arxiv.org/abs/2603.04972")
def karcher(updates: Updates) -> Tensor:
    """The weighted Karcher mean of the updates' directions, as long as their weighted mean length.

    Spherical averaging for any number of updates; for two it is slerp of their directions. An
    update of zero has no direction and counts as length zero.
    """
    shares, gram = updates.shares, updates.gram()
    norms = gram.diagonal().clamp(min=0).sqrt()
    live = norms > SMALL
    if not live.any():
        return shares
    cosines = gram[live][:, live] / torch.outer(norms[live], norms[live])
    if (shares[live] @ cosines @ shares[live]).clamp(min=0).sqrt() < OPPOSED * shares[live].sum():
        raise _cancelled(updates)
    direction = _karcher(cosines, shares[live])
    found = torch.zeros_like(norms)
    found[live] = direction / norms[live] * (shares * norms).sum()
    return found


@coefficients("mean-direction", source="https://en.wikipedia.org/wiki/Slerp")
def mean_direction(updates: Updates) -> Tensor:
    """The normalised weighted mean of directions, as long as the weighted mean length.

    What one step in the tangent space at the mean comes to, which some tools call a multi-slerp: it
    differs from `karcher` by some percent.
    """
    shares, gram = updates.shares, updates.gram()
    norms = gram.diagonal().clamp(min=0).sqrt()
    live = norms > SMALL
    direction = torch.where(live, shares / norms.clamp(min=SMALL), torch.zeros_like(norms))
    length = (direction @ gram @ direction).clamp(min=0).sqrt()
    if not live.any():
        return shares
    if length < OPPOSED * shares[live].sum():
        raise _cancelled(updates)
    return direction / length * (shares * norms).sum()


@coefficients("model-stock", source="https://arxiv.org/abs/2403.19522")
def model_stock(updates: Updates) -> Tensor:
    """The mean of the weighted updates, drawn to the base the more the less they agree.

    t = K c / (1 + (K - 1) c) of the mean, c the mean cosine between two of them; c below zero
    counts as zero. One update is itself.
    """
    weights = updates.weights.double()
    count = len(weights)
    if count == 1:
        return weights
    gram = updates.gram() * torch.outer(weights, weights)
    norms = gram.diagonal().clamp(min=0).sqrt()
    cosines = gram / torch.outer(norms, norms).clamp(min=SMALL)
    cosine = (cosines.sum() - cosines.diagonal().sum()) / (count * (count - 1))
    cosine = cosine.clamp(min=0)
    return count * cosine / (1 + (count - 1) * cosine) * weights / count


def _karcher(cosines: Tensor, shares: Tensor) -> Tensor:
    """Coefficients of the mean of unit vectors with these cosines, by walking along tangents."""
    mean = shares / (shares @ cosines @ shares).sqrt()
    for _ in range(STEPS):
        along = (cosines @ mean).clamp(-1, 1)
        angles = torch.acos(along)
        stretch = torch.where(angles > 1e-9, angles / angles.sin().clamp(min=SMALL), 1.0)
        tangent = shares * stretch / shares.sum()
        tangent = tangent - (tangent * along).sum() * mean
        length = (tangent @ cosines @ tangent).clamp(min=0).sqrt()
        if length < 1e-12:
            break
        mean = torch.cos(length) * mean + torch.sin(length) / length * tangent
        mean = mean / (mean @ cosines @ mean).sqrt()
    return mean


def _cancelled(updates: Updates) -> MergeError:
    return MergeError(
        f"The directions of the updates of {updates.layer} cancel out; use sum instead."
    )
