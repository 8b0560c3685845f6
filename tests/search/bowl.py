"""A measure without a model: every row wants one point, give or take its own noise."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

BEST = np.array([0.6, 0.4, -0.2])


class Bowl:
    """Row r loses |point - BEST - noise_r|^2 / 2 and counts one."""

    def __init__(self, num_rows: int = 40, noise: float = 0.05, best: np.ndarray = BEST) -> None:
        rng = np.random.default_rng(1)
        self.owners: Sequence[str] = ("a", "b", "c", "d", "e")[: len(best)]
        self.sizes = np.ones(num_rows)
        self.wanted = best + noise * rng.standard_normal((num_rows, len(best)))
        self.num_looks = 0

    def losses(self, points, rows):
        self.num_looks += len(points) * len(rows)
        return ((points[:, None] - self.wanted[list(rows)]) ** 2).sum(2) / 2

    def gradient(self, point, rows):
        losses = self.losses(point[None], rows)[0]
        self.num_looks += len(rows)
        return losses, (point - self.wanted[list(rows)]).sum(0)
