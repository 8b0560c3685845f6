"""Entry-by-entry methods on coordinates in a basis that all updates share.

In the layer's own coordinates two updates hardly ever meet; in those of their common singular
vectors they do, what TIES and DARE leave has a low rank by construction, and arrays are small:
[K, R, R] in core space (https://arxiv.org/abs/2509.17786), [K, R, D] for KnOTS
(https://arxiv.org/abs/2410.19735).
"""

from __future__ import annotations

import torch
from torch import Tensor

from loramix.lora import Pair
from loramix.merge.core import Core
from loramix.merge.cores import CORE, TINY
from loramix.merge.entries import dare_ties, ties
from loramix.merge.registry import on_factors
from loramix.merge.rows import View, combined, dense
from loramix.merge.updates import Updates

KNOTS = "https://arxiv.org/abs/2410.19735"


@on_factors("core-ties", source=CORE)
def core_ties(updates: Updates, *, density: float = 0.2) -> Pair:
    """TIES on the R by R cores."""
    core = Core.of(updates, "core-ties")
    view = _view(core.cores, updates)
    return core.pair(combined(view, ties(view, density=density)).double())


@on_factors("core-dare-ties", source=CORE)
def core_dare_ties(updates: Updates, *, density: float = 0.5) -> Pair:
    """DARE-TIES on the R by R cores."""
    core = Core.of(updates, "core-dare-ties")
    view = _view(core.cores, updates)
    return core.pair(combined(view, dare_ties(view, density=density)).double())


@on_factors("knots-ties", source=KNOTS)
def knots_ties(updates: Updates, *, density: float = 0.2) -> Pair:
    """TIES on the right singular parts of all updates side by side."""
    left, right = _aligned(updates, "knots-ties")
    view = _view(right, updates)
    return Pair(combined(view, ties(view, density=density)), left)


@on_factors("knots-dare-ties", source=KNOTS)
def knots_dare_ties(updates: Updates, *, density: float = 0.5) -> Pair:
    """DARE-TIES on the right singular parts of all updates side by side."""
    left, right = _aligned(updates, "knots-dare-ties")
    view = _view(right, updates)
    return Pair(combined(view, dare_ties(view, density=density)), left)


def _view(deltas: Tensor, updates: Updates) -> View:
    return dense(deltas, updates.weights, updates.names, layer=updates.layer, seed=updates.seed)


def _aligned(updates: Updates, method: str) -> tuple[Tensor, Tensor]:
    """U [O, R] and (S V^T)_i [K, R, D] with dW_i = U (S V^T)_i, of [dW_1 | ... | dW_K]."""
    core = Core.of(updates, method)
    side_by_side = torch.cat(list(core.cores), dim=1)  # [P, K Q], the same U as of the updates
    u, s, _ = torch.linalg.svd(side_by_side, full_matrices=False)
    u = u[:, s > TINY * s[0]]
    parts = u.T @ core.cores @ core.to_a  # [K, R, R]
    left = core.b @ (core.to_b @ u).to(core.b.dtype)
    return left, parts.to(core.a.dtype) @ core.a
