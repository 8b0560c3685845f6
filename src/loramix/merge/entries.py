"""Methods that decide entry by entry: rows [K, N, D] at a time, after a look at the whole layer.

Weights are multiplied in before signs are elected and means are taken; with all weights equal to
lambda every method below is the paper's with that scaling factor. A cut is the magnitude from
which on entries are kept, so equal magnitudes are kept together.
"""

from __future__ import annotations

from torch import Tensor

from loramix.errors import MergeError
from loramix.merge.registry import check_share, on_rows
from loramix.merge.rows import Combine, Rows, View


@on_rows("magnitude-prune", source="https://arxiv.org/abs/2306.01708")
def magnitude_prune(view: View, *, density: float = 0.5) -> Combine:
    """The weighted sum of the largest `density` share of each update."""
    trim = trimmed(view, density)
    return lambda rows: weighted(view, trim(rows)).sum(0)


@on_rows("ties", source="https://arxiv.org/abs/2306.01708")
def ties(view: View, *, density: float = 0.2) -> Combine:
    """Trim to the largest `density` share, elect a sign per entry, average those that agree.

    The mean of the paper: the sum of weighted entries over how many agree.
    """
    trim = trimmed(view, density)
    return lambda rows: agreeing_mean(weighted(view, trim(rows)))


@on_rows("ties-normalised", source="https://arxiv.org/abs/2306.01708")
def ties_normalised(view: View, *, density: float = 0.2) -> Combine:
    """TIES with the sum of the agreeing divided by the sum of their weights, as mergekit does.

    Weights then say who counts more where adapters agree, and no longer how strong the result is.
    """
    trim, weights = trimmed(view, density), _column(view)
    if (weights <= 0).any():
        raise MergeError("ties-normalised divides by weights, which must be positive; use ties.")

    def combine(rows: Rows) -> Tensor:
        terms = weights * trim(rows)
        agree = agreement(terms)
        return (terms * agree).sum(0) / (weights * agree).sum(0).clamp(min=1e-8)

    return combine


@on_rows("dare", source="https://arxiv.org/abs/2311.03099")
def dare(view: View, *, density: float = 0.5) -> Combine:
    """Keep a random `density` share of each update, enlarged by 1 / density, and sum."""
    drop = dropped(view, density)
    return lambda rows: weighted(view, drop(rows)).sum(0)


@on_rows("dare-ties", source="https://arxiv.org/abs/2311.03099")
def dare_ties(view: View, *, density: float = 0.5) -> Combine:
    """DARE in place of the trim of TIES: then elect a sign, average those that agree."""
    drop = dropped(view, density)
    return lambda rows: agreeing_mean(weighted(view, drop(rows)))


@on_rows("della", source="https://arxiv.org/abs/2406.11617")
def della(view: View, *, density: float = 0.5, epsilon: float = 0.1) -> Combine:
    """Drop at random, small entries of a row more likely; elect a sign, average those that agree.

    The chance to be kept rises with the rank of the magnitude in its row, from density - epsilon
    to density + epsilon (the paper's epsilon is this whole width); what is kept is divided by it.
    """
    keep = ranked_drop(view, density, epsilon)
    return lambda rows: agreeing_mean(weighted(view, keep(rows)))


@on_rows("della-linear", source="https://arxiv.org/abs/2406.11617")
def della_linear(view: View, *, density: float = 0.5, epsilon: float = 0.1) -> Combine:
    """DELLA's drop by rank of magnitude, then the weighted sum."""
    keep = ranked_drop(view, density, epsilon)
    return lambda rows: weighted(view, keep(rows)).sum(0)


@on_rows("breadcrumbs", source="https://arxiv.org/abs/2312.06795")
def breadcrumbs(view: View, *, density: float = 0.9, gamma: float = 0.01) -> Combine:
    """Drop the `gamma` share of outliers and the smallest, keep a `density` share, and sum."""
    check_share("density", density)
    check_share("gamma", gamma)
    if density + gamma > 1:
        raise MergeError(
            f"density {density:g} and gamma {gamma:g} exceed 1; lower one of them: the outliers "
            f"are dropped before the share that is kept."
        )
    top, bottom = view.cut(_magnitude, gamma), view.cut(_magnitude, density + gamma)

    def combine(rows: Rows) -> Tensor:
        size = rows.deltas.abs()
        return weighted(view, rows.deltas * ((size >= bottom) & (size < top))).sum(0)

    return combine


@on_rows("sce", source="https://arxiv.org/abs/2408.07990")
def sce(view: View, *, density: float = 0.1) -> Combine:
    """Select the entries that differ most between updates, weigh each update by its energy there,
    erase minority signs, and take that weighted mean.

    Signs are elected by the sum of what was selected, before the weights by energy.
    """
    check_share("density", density)
    cut = view.cut(lambda rows: _variance(view, rows), density)

    def selected(rows: Rows) -> Tensor:
        return weighted(view, rows.deltas) * (_variance(view, rows) >= cut)

    energy = view.total(lambda rows: selected(rows).square().sum((1, 2)))
    share = (energy / energy.sum().clamp(min=1e-300)).float()[:, None, None]

    def combine(rows: Rows) -> Tensor:
        terms = selected(rows)
        kept = share * agreement(terms)
        return (terms * kept).sum(0) / kept.sum(0).clamp(min=1e-12)

    return combine


def weighted(view: View, deltas: Tensor) -> Tensor:
    return _column(view) * deltas


def trimmed(view: View, density: float) -> Combine:
    """Each update with zeros below its own cut, [K, N, D]."""
    check_share("density", density)
    cut = view.cut(_magnitude, density)
    return lambda rows: rows.deltas * (rows.deltas.abs() >= cut)


def dropped(view: View, density: float) -> Combine:
    """Each update with a random `density` share, divided by it, [K, N, D]."""
    check_share("density", density, low=1e-3)
    return lambda rows: rows.deltas * (view.uniform(rows) < density) / density


def ranked_drop(view: View, density: float, epsilon: float) -> Combine:
    """Entries kept with a chance that rises with their rank in the row, divided by that chance."""
    if epsilon < 0 or density - epsilon <= 0 or density + epsilon > 1:
        raise MergeError(
            f"density {density:g} -+ epsilon {epsilon:g} leaves (0, 1]; those are chances "
            f"to keep an entry: lower epsilon."
        )

    def keep(rows: Rows) -> Tensor:
        order = rows.deltas.abs().argsort(dim=-1).argsort(dim=-1).float()  # 0 is the smallest
        chance = density - epsilon + 2 * epsilon * order / max(1, rows.deltas.shape[-1] - 1)
        return rows.deltas * (view.uniform(rows) < chance) / chance

    return keep


def agreement(terms: Tensor) -> Tensor:
    """Where an entry is not zero and has the sign of the sum, [K, N, D]."""
    return (terms.sign() == terms.sum(0).sign()) & (terms != 0)


def agreeing_mean(terms: Tensor) -> Tensor:
    """The mean of the entries that have the elected sign, [N, D]."""
    agree = agreement(terms)
    return (terms * agree).sum(0) / agree.sum(0).clamp(min=1)


def _magnitude(rows: Rows) -> Tensor:
    return rows.deltas.abs()


def _variance(view: View, rows: Rows) -> Tensor:
    return weighted(view, rows.deltas).var(0, correction=0)


def _column(view: View) -> Tensor:
    return view.weights.float()[:, None, None]
