"""The updates of one layer as [K, O, D], looked at some rows at a time.

Methods that decide entry by entry (trim, elect a sign, drop) need facts about the whole layer
first, such as the magnitude above which a fifth of it lies. `View` finds those in passes over
blocks of rows, so that no update is ever built as a whole.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

BLOCK = 1 << 21  # entries of one update in a block: 8 MiB in float32
LANES = 8  # float32 numbers that one step of Philox's counter gives


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows `start` to `start + N` of every update."""

    deltas: Tensor  # [K, N, D], float32
    start: int


Combine = Callable[[Rows], Tensor]  # [K, N, D] -> [N, D]: how some rows become one update's


@dataclass(frozen=True, slots=True)
class View:
    """One layer's updates; `read(start, stop)` gives the same rows [K, N, D] every time."""

    layer: str
    names: tuple[str, ...]
    weights: Tensor  # [K]
    shape: tuple[int, int]  # O, D
    read: Callable[[int, int], Tensor]
    seed: int = 0

    def blocks(self) -> Iterator[Rows]:
        step = max(1, BLOCK // self.shape[1])
        for start in range(0, self.shape[0], step):
            yield Rows(self.read(start, min(start + step, self.shape[0])), start)

    def total(self, of: Callable[[Rows], Tensor]) -> Tensor:
        """The sum of a figure over all rows, in float64."""
        return sum(
            (of(rows).double() for rows in self.blocks()), torch.zeros((), dtype=torch.double)
        )

    def cut(self, of: Callable[[Rows], Tensor], share: float) -> Tensor:
        """The number at or above which `share` of the entries of `of` lie; [C] for [C, N, D].

        Exact, in two passes: floats that are not negative sort as their bits do, so the first pass
        counts them by their upper 16 bits and the second, where the cut falls, by the lower 16.
        A share of 1 keeps everything (0), a share of 0 nothing (infinity).
        """
        size = self.shape[0] * self.shape[1]
        keep = round(share * size)
        some = of(next(self.blocks()))
        channels = len(some) if some.dim() == 3 else 1
        if keep in (0, size):
            return torch.full((channels, 1, 1), 0.0 if keep else torch.inf)
        upper, above = self._digit(of, channels, keep=torch.full((channels,), keep), prefix=None)
        lower, _ = self._digit(of, channels, keep=keep - above, prefix=upper)
        return ((upper << 16) | lower).int().view(torch.float32)[:, None, None]

    def _digit(
        self, of: Callable[[Rows], Tensor], channels: int, *, keep: Tensor, prefix: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The 16 bits of the `keep`-th largest number, [C], and how many numbers lie above them."""
        counts = torch.zeros(channels, 1 << 16, dtype=torch.long)
        for rows in self.blocks():
            bits = of(rows).float().reshape(channels, -1).view(torch.int32)
            for c in range(channels):
                if prefix is None:
                    counts[c] += torch.bincount(bits[c] >> 16, minlength=1 << 16)
                else:
                    here = bits[c][(bits[c] >> 16) == prefix[c]]
                    counts[c] += torch.bincount(here & 0xFFFF, minlength=1 << 16)
        from_top = counts.flip(1).cumsum(1)
        place = (from_top < keep[:, None]).sum(1, keepdim=True)  # the first to reach `keep`
        above = (from_top.gather(1, place) - counts.flip(1).gather(1, place))[:, 0]
        return (1 << 16) - 1 - place[:, 0], above

    def uniform(self, rows: Rows) -> Tensor:
        """A number in [0, 1) for every entry of every update, [K, N, D].

        Counter-based (Philox, Salmon et al. 2011): it depends on the seed, the layer, the adapter's
        name, the row and the column, and not on how rows are put into blocks or adapters in order.
        """
        count, width = rows.deltas.shape[1], self.shape[1]
        steps = -(-width // LANES)
        found = []
        for name in self.names:
            key = hashlib.sha256(f"{self.seed}\n{self.layer}\n{name}".encode()).digest()
            bits = np.random.Philox(key=np.frombuffer(key[:16], np.uint64))
            bits.advance(rows.start * steps)
            drawn = np.random.Generator(bits).random((count, steps * LANES), np.float32)
            found.append(torch.from_numpy(drawn)[:, :width])
        return torch.stack(found)


def dense(
    deltas: Tensor,
    weights: Tensor,
    names: tuple[str, ...] = (),
    *,
    layer: str = "",
    seed: int = 0,
) -> View:
    """A view of updates [K, O, D] that are there already, such as coordinates in a small basis."""
    names = names or tuple(f"update-{k}" for k in range(len(deltas)))
    shape = (deltas.shape[1], deltas.shape[2])
    single = deltas.float()
    return View(layer, names, weights, shape, lambda start, stop: single[:, start:stop], seed)


def combined(view: View, combine: Combine) -> Tensor:
    """All rows, [O, D]: for what is known to be small."""
    return torch.cat([combine(rows) for rows in view.blocks()])
