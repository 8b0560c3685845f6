"""What every part of the router's benchmark is made from, and the rows it prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from judged import PEER, peer, their_hits
from queries import Memo, Pairs
from semantic_router import IndexedRouter

from loramix.route.gate import GateRouter


class Row(NamedTuple):
    work: str
    figure: float
    unit: str
    peer: float
    target: float | None  # None: measured to be known
    better: str = "higher"

    def __str__(self) -> str:
        figures = f"{self.figure:8.2f} {self.unit:4} {PEER} {self.peer:8.2f}"
        return f"{self.work:58}{figures}  {self.verdict}"

    @property
    def verdict(self) -> str:
        if self.target is None:
            return ""
        high = self.better == "higher"
        reached = self.figure >= self.target if high else self.figure <= self.target
        goal = f"target {'>=' if high else '<='} {self.target:g}"
        return goal if reached else f"{goal}  NOT REACHED"


class World(NamedTuple):
    """The data sets, the encoder, how often to draw, and what parts have fitted and judged."""

    memo: Memo
    clinc: dict[str, Pairs]
    banking: dict[str, Pairs]
    domain: dict[str, str]
    draws: int
    fitted: dict[int, GateRouter]
    judged: dict[tuple[int, int], float]

    def broad(self, split: str) -> Pairs:
        return [(text, self.domain[intent]) for text, intent in self.clinc[split]]

    def ours(self, examples: Mapping[str, Sequence[str]]) -> GateRouter:
        """Fitted once, whichever parts ask; the order of examples does not matter to it."""
        key = _key(examples)
        if key not in self.fitted:
            self.fitted[key] = GateRouter.fit(examples, encoder=self.memo)
        return self.fitted[key]

    def theirs(self, examples: Mapping[str, Sequence[str]]) -> IndexedRouter:
        return peer(examples, self.memo)

    def their_hits(self, examples: Mapping[str, Sequence[str]], rows: Pairs) -> float:
        """Judged once, whichever parts ask."""
        key = _key(examples), hash(tuple(rows))
        if key not in self.judged:
            self.judged[key] = their_hits(self.theirs(examples), rows)
        return self.judged[key]


def _key(examples: Mapping[str, Sequence[str]]) -> int:
    return hash(frozenset((route, *sorted(group)) for route, group in examples.items()))
