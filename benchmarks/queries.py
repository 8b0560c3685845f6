"""What the router's benchmark is asked: CLINC150, BANKING77, and sets made from them.

Both are looked for in $LORAMIX_DATA as `clinc150/` and `banking77/`. The made sets are synthetic:
typing errors, and two queries of different routes joined into one.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import string
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loramix.mix import slug
from loramix.route.encode import MiniLmEncoder, Tokens
from loramix.route.ngrams import Floats

Pairs = list[tuple[str, str]]  # text, route
DATA = Path(os.environ.get("LORAMIX_DATA", "data"))
JOINERS = (" and then ", ", also ", " plus ", ". oh and ", " while you are at it ", " & ")


class Memo:
    """The sentence encoder, which encodes no text twice; everyone gets the same vectors."""

    def __init__(self, cache: Path | None = None) -> None:
        self.encoder = MiniLmEncoder.open()
        self.digest = self.encoder.digest
        self.cache = cache
        self.known: dict[str, Floats] = {}
        self.read: dict[str, Tokens] = {}  # in memory only: 18 KB a text
        if cache and cache.exists():
            with np.load(cache) as found:
                self.known = dict(zip(found["texts"].tolist(), found["vectors"], strict=True))

    def encode(self, texts: Sequence[str]) -> Floats:
        new = [text for text in dict.fromkeys(texts) if text not in self.known]
        if new:
            self.known |= zip(new, self.encoder.encode(new), strict=True)
        found = [self.known[text] for text in texts]
        return np.stack(found) if found else self.encoder.encode([])

    def tokens(self, text: str) -> Tokens:
        if text not in self.read:
            self.read[text] = self.encoder.tokens(text)
        return self.read[text]

    def save(self) -> None:
        if self.cache:
            texts = np.array(list(self.known))
            np.savez(self.cache, texts=texts, vectors=np.stack(list(self.known.values())))


def lines(name: str) -> list[dict[str, Any]]:
    with gzip.open(DATA / name, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def clinc() -> dict[str, Pairs]:
    """Splits train, val, test of 150 intents; oos_val and oos_test of none, under "oos"."""
    found: dict[str, Pairs] = {}
    for row in lines("clinc150/data_full.jsonl.gz"):
        found.setdefault(row["split"], []).append((row["text"], slug(row["intent"])))
    return found


def domains() -> dict[str, str]:
    """The one of ten domains that each intent of CLINC150 belongs to."""
    found = json.loads((DATA / "clinc150" / "domains.json").read_text("utf-8"))
    return {slug(intent): slug(name) for name, intents in found.items() for intent in intents}


def banking() -> dict[str, Pairs]:
    return {
        split: [(row["text"], slug(row["intent"])) for row in lines(f"banking77/{split}.jsonl.gz")]
        for split in ("train", "test")
    }


def texts(rows: Pairs) -> list[str]:
    return [text for text, _ in rows]


def grouped(rows: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for text, route in rows:
        found.setdefault(route, []).append(text)
    return found


def few(rows: Pairs, count: int, seed: int, *, named: bool) -> dict[str, list[str]]:
    """`count` random examples of each route; `named` adds its name in words, as a card would."""
    rng = random.Random(seed)
    chosen = {route: rng.sample(texts, count) for route, texts in sorted(grouped(rows).items())}
    if not named:
        return chosen
    return {route: [*texts, spoken(route)] for route, texts in chosen.items()}


def spoken(route: str) -> str:
    return route.replace("_", " ").replace("-", " ")


def mistyped(text: str, rng: random.Random, share: float = 0.08) -> str:
    """A share of the characters replaced, left out, doubled up with another, or swapped."""
    found, rest = [], list(text)
    while rest:
        char, stray = rest.pop(0), rng.choice(string.ascii_lowercase)
        if rng.random() >= share:
            found.append(char)
            continue
        kind = rng.randrange(4)
        swapped = [rest.pop(0), char] if kind == 3 and rest else [char]
        found += ([stray], [], [char, stray], swapped)[kind]
    return "".join(found)


def joined(rows: Pairs, of: Mapping[str, str], count: int, seed: int) -> list[tuple[str, set[str]]]:
    """Two queries of different routes in one, with one of JOINERS between them."""
    rng = random.Random(seed)
    found: list[tuple[str, set[str]]] = []
    while len(found) < count:
        (first, a), (second, b) = rng.sample(rows, 2)
        if of[a] != of[b]:
            found.append((first + rng.choice(JOINERS) + second, {of[a], of[b]}))
    return found
