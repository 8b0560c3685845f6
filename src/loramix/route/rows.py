"""Examples of many adapters as numbered rows: cleaned, capped, shuffled, counted, embedded."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from loramix.errors import RouteError
from loramix.mix import check_name
from loramix.route.encode import Encoder
from loramix.route.ngrams import Floats, Ints, NgramEncoder, Sparse, clip, words

Mask = NDArray[np.bool_]

MAX_EXAMPLES = 4000  # of one adapter; more do not move the gate
FOLDS = 5
SCARCE = 50


class Batch(NamedTuple):
    """Texts as a router sees them."""

    counts: Sparse  # [N, 2**bits]
    vectors: Floats | None  # [N, D]

    def take(self, rows: Ints) -> Batch:
        return Batch(self.counts.take(rows), None if self.vectors is None else self.vectors[rows])


def read(texts: Sequence[str], ngrams: NgramEncoder, encoder: Encoder | None) -> Batch:
    """Count the n-grams of texts, and embed them where there is a sentence encoder."""
    vectors = encoder.encode(texts) if encoder else None
    return Batch(ngrams.matrix(texts), vectors)


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Labelled texts. Label K, one past the last adapter, is the background."""

    adapters: tuple[str, ...]
    texts: tuple[str, ...]
    labels: Ints  # [N]
    batch: Batch

    @property
    def none(self) -> int:
        return len(self.adapters)

    def take(self, rows: Ints) -> Rows:
        texts = tuple(self.texts[i] for i in rows)
        return Rows(self.adapters, texts, self.labels[rows], self.batch.take(rows))

    def without(self, adapters: Ints, limit: int) -> Rows:
        """At most `limit` rows of each other adapter and of the background, labels closed up."""
        others = np.setdiff1d(np.arange(self.none), adapters)
        kept = [np.flatnonzero(self.labels == label)[:limit] for label in (*others, self.none)]
        rows = self.take(np.concatenate(kept))
        labels = np.repeat(np.arange(len(kept)), [len(part) for part in kept])
        return replace(rows, adapters=tuple(self.adapters[i] for i in others), labels=labels)

    def counts(self) -> Ints:
        """How many rows each adapter has, [K]."""
        return np.bincount(self.labels, minlength=self.none + 1)[:-1]

    def fold(self, fold: int) -> Mask:
        """One of FOLDS disjoint shares of every adapter with enough rows; True is held out."""
        rank = np.zeros(len(self.labels), np.int64)
        for label in range(self.none + 1):
            mine = np.flatnonzero(self.labels == label)
            rank[mine] = np.arange(len(mine)) if len(mine) >= FOLDS else -1
        held: Mask = (rank >= 0) & (rank % FOLDS == fold)
        return held

    def scarce(self) -> Ints:
        """The rows of adapters with fewer than SCARCE of them."""
        few = np.flatnonzero(self.counts() < SCARCE)
        return np.flatnonzero(np.isin(self.labels, few))

    def examples(self) -> dict[str, tuple[str, ...]]:
        """The texts by adapter, in the order of the rows; the background last, under ""."""
        found: dict[str, list[str]] = {name: [] for name in (*self.adapters, "")}
        for text, label in zip(self.texts, self.labels, strict=True):
            found[(*self.adapters, "")[label]].append(text)
        return {name: tuple(texts) for name, texts in found.items()}


def read_queries(path: Path) -> list[str]:
    """The queries of one adapter in a file: lines of text, or of JSON where it is a .jsonl.

    A line of JSON has a "text", or a "query". Raises RouteError, naming the line.
    """
    try:
        lines = path.read_text("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise RouteError(f"{path.name} is not UTF-8 text; expected one query a line.") from error
    found = {n: line.strip() for n, line in enumerate(lines, 1) if line.strip()}
    if not found:
        raise RouteError(f"{path.name} is empty; expected one query a line.")
    queries = [*found.values()]
    if path.suffix == ".jsonl":
        queries = [_query(line, f"Line {n} of {path.name}") for n, line in found.items()]
    if not any(map(words, queries)):
        raise RouteError(f"No line of {path.name} has a word in it; expected queries.")
    return queries


def _query(line: str, where: str) -> str:
    try:
        row = json.loads(line)
        said = row.get("text", row.get("query"))
    except (ValueError, AttributeError) as error:
        raise RouteError(f"{where} is no JSON object; expected one a line.") from error
    if not isinstance(said, str):
        raise RouteError(f'{where} has no query; expected {{"text": "..."}}.')
    return said


def collect(
    examples: Mapping[str, Sequence[str]],
    background: Iterable[str],
    ngrams: NgramEncoder,
    encoder: Encoder | None,
    known: Mapping[str, Floats] | None = None,
) -> Rows:
    """Number the examples. `known` has the vectors of texts that were embedded before.

    Raises RouteError for an adapter, or a background, without a usable example.
    """
    if not examples:
        raise RouteError("A router needs the examples of one adapter at least; got none.")
    adapters = tuple(sorted(check_name(name) for name in examples))
    groups = [clean(examples[name]) for name in adapters]
    for name, group in zip(adapters, groups, strict=True):
        if not group:
            raise RouteError(f"No example of {name!r} has a word in it; give one query at least.")
    groups.append(clean(background))
    if not groups[-1]:
        raise RouteError("No foreign query has a word in it; leave them out for the packaged ones.")
    texts = tuple(text for group in groups for text in group)
    labels = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    return Rows(adapters, texts, labels, _read_known(texts, ngrams, encoder, known or {}))


def clean(texts: Iterable[str]) -> list[str]:
    """Clipped texts with words in them, one of each that reads alike, in the order of a hash.

    That order is random enough to take the first few, and leaving texts out does not change it.
    """
    alike: dict[str, str] = {}
    for text in sorted(texts):
        alike.setdefault(" ".join(words(text)), clip(text))
    alike.pop("", None)
    found = sorted(alike, key=lambda key: (zlib.crc32(key.encode()), key))
    return [alike[key] for key in found[:MAX_EXAMPLES]]


def _read_known(
    texts: Sequence[str], ngrams: NgramEncoder, encoder: Encoder | None, known: Mapping[str, Floats]
) -> Batch:
    if encoder is None:
        return read(texts, ngrams, None)
    new = [text for text in texts if text not in known]
    vectors = {**known, **dict(zip(new, encoder.encode(new), strict=True))}
    return Batch(ngrams.matrix(texts), np.stack([vectors[text] for text in texts]))
