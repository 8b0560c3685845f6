"""Several datasets as one: behind each other, or their rows in turn.

The order is that of `interleave_datasets` of Hugging Face's datasets, but for its random draws.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from typing import TypeVar

from loramix.errors import TrainError

Row = TypeVar("Row")
# how they come together, and what of them ends it
MIXED = {
    "concat": "the rows of each behind those of the one before",
    "interleave_under": "in turn until the first of them has no row left",
    "interleave_over": "in turn until each was given whole, beginning shorter ones anew",
    "interleave_once": "in turn, every row once",
}


@dataclass(frozen=True, slots=True)
class Mixing:
    """How the rows of several datasets come together. Raises TrainError."""

    strategy: str = "concat"  # one of MIXED
    shares: tuple[float, ...] = ()  # how often each is drawn from; none given: in strict turn
    seed: int = 0

    def __post_init__(self) -> None:
        if self.shares and self.strategy == "concat":
            raise TrainError("interleave_probs is for a mix_strategy that interleaves; drop it.")
        if self.shares and not all(0 < share < float("inf") for share in self.shares):
            raise TrainError(f"interleave_probs is {self.shares}; expected numbers above 0.")

    def __call__(self, parts: Sequence[Sequence[Row]]) -> list[Row]:
        """The rows of these datasets in one list."""
        if self.shares and len(self.shares) != len(parts):
            raise TrainError(
                f"interleave_probs has {len(self.shares)} numbers for {len(parts)} datasets; "
                f"expected one for each."
            )
        if self.strategy == "concat" or len(parts) == 1:
            return list(chain.from_iterable(parts))
        if not all(parts):
            raise TrainError(
                "A dataset that is to be interleaved has no row to learn; drop it, or concat."
            )
        return list(self._in_turn(parts))

    def _in_turn(self, parts: Sequence[Sequence[Row]]) -> Iterator[Row]:
        taken = [0] * len(parts)
        enough = any if self.strategy == "interleave_under" else all
        for turn in self._turns(len(parts)):
            over = [n >= len(part) for n, part in zip(taken, parts, strict=True)]
            if enough(over):
                return
            for k in turn:
                if taken[k] < len(parts[k]) or self.strategy != "interleave_once":
                    yield parts[k][taken[k] % len(parts[k])]
                    taken[k] += 1

    def _turns(self, count: int) -> Iterator[Sequence[int]]:
        """Which datasets give their next row: each in its turn, or one drawn by the shares."""
        if not self.shares:
            yield from repeat(range(count))
        rng = random.Random(self.seed)
        while True:
            yield rng.choices(range(count), self.shares)
