"""What a merge method is given: the updates of one layer, as factors, with their weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from loramix.errors import MergeError
from loramix.lora import Pair, stack
from loramix.merge.rows import Combine, Rows, View

Weight = Callable[[int, int], Tensor]  # rows [N, D] of the pristine base, float32


@dataclass(frozen=True, slots=True)
class Inputs:
    """Second moments of what a layer is given, over the rows of each of K adapters, in float64.

    `gram` has the means of (A x)(A x)^T, with the A's of all adapters side by side: R by R of what
    would be D by D. `squares` has those of x * x.
    """

    gram: Tensor  # [K, R, R]
    squares: Tensor  # [K, D]


@dataclass(frozen=True, slots=True)
class Updates:
    """The updates that K adapters have for one layer, in float32; None where one has none.

    `base` reads rows of the layer's own weight: a DoRA update is nothing without it. `inputs` are
    there if rows were run through the base before.
    """

    layer: str
    names: tuple[str, ...]
    weights: Tensor  # [K]
    pairs: tuple[Pair | None, ...]
    base: Weight | None = None
    seed: int = 0
    inputs: Inputs | None = None

    @property
    def shares(self) -> Tensor:
        """The weights, normalised to sum to one, [K]; MergeError if one is negative."""
        weights = self.weights.double()
        if (weights < 0).any() or weights.sum() <= 0:
            shown = ", ".join(f"{weight:g}" for weight in weights.tolist())
            raise MergeError(
                f"This method takes shares of the weights; {shown} must not be negative."
            )
        return weights / weights.sum()

    @property
    def present(self) -> list[Pair]:
        return [pair for pair in self.pairs if pair is not None]

    @property
    def shape(self) -> tuple[int, int]:
        """O, D"""
        first = self.present[0]
        return first.b.shape[0], first.a.shape[1]

    @property
    def rank(self) -> int:
        """Of all updates side by side."""
        return sum(pair.rank for pair in self.present)

    @property
    def are_factors(self) -> bool:
        """Whether each is b @ a, whatever the base: no DoRA among them."""
        return all(pair.magnitude is None for pair in self.present)

    def view(self) -> View:
        """The updates by rows."""
        if not self.are_factors and self.base is None:
            raise MergeError(
                f"{self.layer} has a DoRA update, which depends on the base weights; merge into "
                f"the base with --into, or convert the adapter to a plain LoRA first."
            )
        return View(self.layer, self.names, self.weights, self.shape, self._read, self.seed)

    def factors(self, method: str) -> tuple[Tensor, Tensor, list[slice]]:
        """B's [O, R] and A's [R, D] of those present side by side, and the ranks of each of K."""
        if not self.are_factors:
            raise MergeError(
                f"{self.layer} has a DoRA update, which has no factors for {method!r} to work on; "
                f"use sum or ties with --into, or convert the adapter to a plain LoRA first."
            )
        places, end = [], 0
        for pair in self.pairs:
            places.append(slice(end, end := end + (pair.rank if pair else 0)))
        b = torch.cat([pair.b for pair in self.present], dim=1)
        return b, torch.cat([pair.a for pair in self.present]), places

    def gram(self) -> Tensor:
        """The inner products <dW_i, dW_j>, [K, K], in float64."""
        if not self.are_factors:
            return self.view().total(
                lambda rows: torch.einsum("kod,lod->kl", rows.deltas, rows.deltas)
            )
        b, a, places = self.factors("gram")
        b, a = b.double(), a.double()
        products = (b.T @ b) * (a @ a.T)  # tr((B_i A_i)^T B_j A_j) is a sum of its entries
        blocks = [[products[rows, columns].sum() for columns in places] for rows in places]
        return torch.stack([torch.stack(row) for row in blocks])

    def summed(self, coefficients: Tensor) -> Pair | Combine:
        """sum_k c_k dW_k: as factors with the ranks added up, by rows if there is a DoRA.

        An update that is alone and of coefficient one is returned as it is, a DoRA too.
        """
        terms = [(c, pair) for c, pair in zip(coefficients, self.pairs, strict=True) if pair]
        if len(terms) == 1 and terms[0][0] == 1:
            return terms[0][1]
        if not self.are_factors:
            return partial(_weighted_sum, coefficients.float())
        return stack((float(c), pair) for c, pair in terms)

    def _read(self, start: int, stop: int) -> Tensor:
        weight = self.base(start, stop) if self.base and not self.are_factors else None
        deltas = torch.zeros(len(self.pairs), stop - start, self.shape[1])
        for delta, pair in zip(deltas, self.pairs, strict=True):
            if pair is None:
                continue
            if pair.magnitude is None:
                torch.mm(pair.b[start:stop], pair.a, out=delta)
            else:
                some = Pair(pair.a, pair.b[start:stop], pair.magnitude[start:stop])
                delta.copy_(some.delta(weight))
        return deltas


def _weighted_sum(weights: Tensor, rows: Rows) -> Tensor:
    return torch.einsum("k,kod->od", weights, rows.deltas)
