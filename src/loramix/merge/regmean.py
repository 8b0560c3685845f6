"""RegMean in core space: the update nearest to each of several on that one's own inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from loramix.errors import MergeError
from loramix.lora import Pair
from loramix.merge.core import Core
from loramix.merge.registry import check_share, on_factors
from loramix.merge.updates import Updates

RIDGE = 1e-9  # of the mean square of an input: where no row says anything, the average


@on_factors("regmean", source="https://arxiv.org/abs/2212.09849", reads_inputs=True)
def regmean(updates: Updates, *, off_diagonal: float = 0.9) -> Pair:
    """The least squares of (dW - dW_i) x over the inputs x of each adapter's rows.

    With G_i the second moments of these inputs, their entries off the diagonal multiplied by
    `off_diagonal` as in the paper, it is dW = (sum_i w_i dW_i G_i) (sum_i w_i G_i)^-1. The D by D
    matrices G are not built: dW is sought among updates that read what the adapters read,
    dW = M V^T with V a basis of all their A's rows, and for those

        M = (sum_i w_i dW_i V H_i) (sum_i w_i H_i)^-1    H_i = V^T G_i V    [R, R]

    is exact. Weights are shares; adapters with equal moments give `average`.
    """
    check_share("off_diagonal", off_diagonal)
    if updates.inputs is None:
        raise MergeError(
            "regmean weighs by what layers are given; give rows of each adapter with --data."
        )
    core = Core.of(updates, "regmean")
    moments = _moments(updates, core, off_diagonal)
    weighed = updates.shares[:, None, None] * moments
    total = weighed.sum(0)
    if not total.diagonal().sum() > 0:
        raise MergeError(f"No row gave {updates.layer} an input; give others.")
    wanted = (core.cores @ weighed).sum(0)
    return core.pair(torch.linalg.solve(total, wanted, left=False))


def _moments(updates: Updates, core: Core, off_diagonal: float) -> Tensor:
    """H_i in the basis V of the core, [K, Q, Q]."""
    inputs = updates.inputs
    assert inputs is not None
    basis = core.to_a @ core.a.double()  # V^T [Q, D]
    whole = core.to_a @ inputs.gram @ core.to_a.T
    diagonal = (basis * inputs.squares[:, None]) @ basis.T
    ridge = RIDGE * inputs.squares.mean() * torch.eye(len(basis), dtype=torch.double)
    return off_diagonal * whole + (1 - off_diagonal) * diagonal + ridge
