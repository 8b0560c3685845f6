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

THINGS = ("card", "cash", "account", "transfer", "payment", "pin")
FATES = ("stolen", "blocked", "declined", "late", "lost")
VERBS = ("count", "list", "show", "sum", "sort")
COLUMNS = ("names of all singers", "ages of all pupils", "prices of all cars",
           "titles of all books", "areas of all states", "years of all films")  # fmt: skip
QUERIES = {
    "banking": [f"my {thing} was {fate}" for thing in THINGS for fate in FATES],
    "sql": [f"{verb} the {column}" for verb in VERBS for column in COLUMNS],
}
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
