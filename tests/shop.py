"""A tiny base on disk, a library of two adapters and their router: what the command line opens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from loramix.formats import peft
from loramix.library import Library
from loramix.lm import ROUTER
from loramix.route.encode import NgramEncoder
from loramix.route.gate import GateRouter
from tests.tiny import random_adapter, tiny_base

QUERIES = {
    "banking": [f"my {thing} was {what}" for thing in ("card", "cash", "account", "transfer",
                "payment", "pin") for what in ("stolen", "blocked", "declined", "late", "lost")],
    "sql": [f"{verb} the {what} of all {things}" for verb in ("count", "list", "show", "sum", "sort")
            for what, things in (("names", "singers"), ("ages", "pupils"), ("prices", "cars"),
                                 ("titles", "books"), ("areas", "states"), ("years", "films"))],
}  # fmt: skip
BANKING, SQL = "my card was blocked", "list the names of all pupils"


@dataclass(frozen=True, slots=True)
class Shop:
    base: str
    library: str

    @property
    def flags(self) -> list[str]:
        return ["--base", self.base, "--library", self.library]


def build(folder: Path) -> Shop:
    """Write everything into a folder; the adapters are random, the router is not."""
    base = tiny_base(seed=1)
    base.model.save_pretrained(folder / "base")
    base.tokenizer.save_pretrained(folder / "base")
    shelf = Library(folder / "library")
    for seed, name in enumerate(QUERIES):
        peft.write(random_adapter(base.model, name, seed=seed), folder / name)
        shelf.add(str(folder / name))
    GateRouter.fit(QUERIES, encoder=NgramEncoder()).save(folder / "library" / ROUTER)
    return Shop(str(folder / "base"), str(folder / "library"))
