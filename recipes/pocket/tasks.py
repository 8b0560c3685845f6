"""The five tasks of pocket: real questions and answers; nothing held out is ever learned.

Every task yields the rows to train on and the rows to be judged by, as `Example`s. Sources and
licences are in `SOURCES`; the folder of data is the one `LORAMIX_DATA` names (see README.md here).
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loramix.chat import Example

TASKS = ("banking", "math", "sentiment", "sql", "support")

SOURCES = {
    "banking": "BANKING77 (PolyAI, CC BY 4.0), 77 intents, official train and test files",
    "math": "MAWPS/ASDiv-A training questions and SVAMP (Patel et al. 2021, MIT), to equations",
    "sentiment": "Movie-review sentence polarity (Pang & Lee 2005, CC BY 4.0)",
    "sql": "Advising text-to-SQL (Finegan-Dollak et al. 2018, CC BY 4.0), question split",
    "support": "Bitext customer-support intents (CDLA-Sharing 1.0), train and dev files",
}

POLARITY = ("negative", "positive")  # by label


@dataclass(frozen=True, slots=True)
class Task:
    name: str
    train: tuple[Example, ...]
    heldout: tuple[Example, ...]


def load(name: str, data: Path) -> Task:
    train, heldout = LOADERS[name](data)
    unseen = {plain(e.query) for e in heldout}
    kept = [e for e in train if plain(e.query) not in unseen]
    return Task(name, tuple(kept), tuple(heldout))


def shape(text: str) -> str:
    return re.sub(r"\d+", "0", plain(text))


def rows(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        yield from (json.loads(line) for line in lines)


def plain(text: str) -> str:
    return " ".join(re.findall(r"[a-z0-9']+", text.lower()))


def _banking(data: Path) -> tuple[list[Example], list[Example]]:
    def read(part: str) -> list[Example]:
        found = rows(data / f"banking77/{part}.jsonl.gz")
        return [Example.of(r["text"].strip(), r["intent"], "banking") for r in found]

    return read("train"), read("test")


def _support(data: Path) -> tuple[list[Example], list[Example]]:
    def read(part: str) -> list[Example]:
        found = rows(data / f"support/bitext_{part}.jsonl.gz")
        return [Example.of(r["utterance"].strip(), r["intent"], "support") for r in found]

    return read("train"), read("dev")


def _sentiment(data: Path) -> tuple[list[Example], list[Example]]:
    """The last 1,066 rows of a seed-0 shuffle of all sentences are held out."""
    found = list(rows(data / "sentiment/rotten_tomatoes_mr.jsonl.gz"))
    random.Random(0).shuffle(found)
    examples = [Example.of(r["text"].strip(), POLARITY[r["label"]], "sentiment") for r in found]
    return examples[:-1066], examples[-1066:]


def _sql(data: Path) -> tuple[list[Example], list[Example]]:
    def pick(*parts: str) -> list[Example]:
        return [
            Example.of(r["question"].strip(), r["sql"], "sql")
            for r in rows(data / "text2sql/text2sql.jsonl.gz")
            if r["db"] == "advising" and r["split"] in parts
        ]

    return pick("train", "exclude"), pick("dev", "test")


def _math(data: Path) -> tuple[list[Example], list[Example]]:
    """A tenth of the questions, chosen by a hash of their text without numbers, is held out."""
    problems = [*_mawps(data), *svamp(data)]
    train: list[Example] = []
    heldout: list[Example] = []
    for question, equation in problems:
        example = Example.of(question, equation, "math")
        held = hashlib.sha256(shape(question).encode()).digest()[0] < 26
        (heldout if held else train).append(example)
    return train, heldout


def _mawps(data: Path) -> Iterator[tuple[str, str]]:
    for row in rows(data / "math/mawps_asdiv_train.jsonl.gz"):
        numbers = [_plain(n) for n in row["Numbers"].split()]
        question = re.sub(r"number(\d+)", lambda m: numbers[int(m[1])], row["Question"])  # noqa: B023
        prefix = [
            numbers[int(t[6:])] if t.startswith("number") else _plain(t)
            for t in row["Equation"].split()
        ]
        yield " ".join(question.split()), infix(prefix)


def svamp(data: Path) -> Iterator[tuple[str, str]]:
    with gzip.open(data / "math/svamp.json.gz", "rt", encoding="utf-8") as file:
        for row in json.load(file):
            tokens = [_plain(t) for t in row["Equation"].split()]
            inner = tokens[1:-1] if tokens[0] == "(" and _wraps(tokens) else tokens
            yield f"{row['Body'].strip().rstrip('.')} . {row['Question'].strip()}", " ".join(inner)


def infix(prefix: list[str]) -> str:
    """Polish notation with brackets where a reader needs them.

    >>> infix(["/", "-", "9", "1", "2"])
    '( 9 - 1 ) / 2'
    """

    def take(top: bool) -> str:
        token = prefix.pop(0)
        if token not in "+-*/":
            return token
        text = f"{take(False)} {token} {take(False)}"
        return text if top else f"( {text} )"

    prefix = list(prefix)
    return take(True)


def renumbered(example: Example, rng: random.Random) -> Example:
    """The same question with other whole numbers in the same order of size.

    It teaches to copy numbers from the question instead of remembering common ones.
    """
    old = sorted({t for t in example.answer.split() if t.isdigit()}, key=int)
    present = set(re.findall(r"\d+", example.query))
    if not old or not set(old) <= present:
        return example
    new = sorted(rng.sample(range(2, 100), len(old)))
    swap = dict(zip(old, map(str, new), strict=True))
    query = re.sub(r"(?<![\d.])\d+(?![\d.]*\d)", lambda m: swap.get(m[0], m[0]), example.query)
    answer = " ".join(swap.get(t, t) for t in example.answer.split())
    return Example.of(query, answer, example.adapter)


def thinned(example: Example, share: float, rng: random.Random) -> Example:
    """The same sentence with a share of its words left out: no single word may decide alone."""
    words = example.query.split()
    kept = [word for word in words if rng.random() >= share] or words
    return Example.of(" ".join(kept), example.answer, example.adapter)


def review_parts(task: Task, data: Path, lines: int = 2) -> list[Example]:
    """Whole film reviews in parts of two sentences, each with the polarity of its review.

    They teach which words praise and which do not. Parts that hold a held-out sentence are left
    out.
    """
    heldout = [plain(e.query) for e in task.heldout]
    parts = []
    for row in rows(data / "sentiment/movie_reviews_2k_head1000.jsonl.gz"):
        sentences = [text.strip() for text in row["text"].split("\n")[:-1] if len(text) > 20]
        for start in range(0, len(sentences), lines):
            part = " ".join(sentences[start : start + lines])
            spoken = plain(part)
            if not any(text in spoken for text in heldout):
                parts.append(Example.of(part, POLARITY[row["label"]], task.name))
    return parts


def _plain(token: str) -> str:
    return token[:-2] if re.fullmatch(r"\d+\.0", token) else token


def _wraps(tokens: list[str]) -> bool:
    """Whether the first bracket closes only at the end."""
    depth = 0
    for index, token in enumerate(tokens):
        depth += (token == "(") - (token == ")")
        if depth == 0:
            return index == len(tokens) - 1
    return False


LOADERS: dict[str, Callable[[Path], tuple[list[Example], list[Example]]]] = {
    "banking": _banking,
    "math": _math,
    "sentiment": _sentiment,
    "sql": _sql,
    "support": _support,
}
