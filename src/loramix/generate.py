"""Rows that a model writes about a topic, to train an expert on: checked, told apart, resumable.

The model is asked for a few rows at a time, each time from another angle. What it says is read
strictly: a row is two texts, and one that says what another did is dropped. Everything that was
read is kept in a journal beside the file, so that a run that was cut off goes on where it was; the
file itself appears when it is whole.

    rows.jsonl.part    {"topic": ..., "seed": 0}
                       {"request": 0, "rows": [...], "dropped": {"said before": 2}}
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from loramix.errors import BadRequest, TrainError
from loramix.formats.aside import aside

PER_REQUEST = 5  # rows
PATIENCE = 6  # requests without one new row, after which nothing more is expected
MISTAKEN = 50  # brackets of an answer that may open no JSON
NEAR = 0.8  # share of words that two prompts have in common if they say the same
LONGEST = {"prompt": 2_000, "completion": 8_000}  # characters
ANGLES = (
    "a beginner who knows nothing yet",
    "an expert who needs one detail",
    "somebody in a hurry, in a few words",
    "somebody who has a problem and describes it",
    "somebody who compares two things",
    "somebody who is mistaken about something",
    "somebody who wants the steps, one by one",
    "somebody who wants an example",
)

Row = dict[str, str]
Writer = Callable[[str, int], str]  # a prompt and a seed -> what the model says


@dataclass
class Journal:
    """What was read so far. A last line that was cut short is asked for again."""

    file: Path
    topic: str
    seed: int
    rows: list[Row] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    num_requests: int = 0

    def open(self) -> None:
        """Take up what is there, or begin. TrainError if it is of another topic or seed."""
        head = {"topic": self.topic, "seed": self.seed}
        if not self.file.exists():
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.write_text(json.dumps(head) + "\n", encoding="utf-8")
            return
        whole, _, _ = self.file.read_bytes().rpartition(b"\n")
        try:
            first, *told = map(json.loads, whole.splitlines())
            if first != head:
                raise TrainError(
                    f"{self.file} is of the topic {first['topic']!r} and seed {first['seed']}; "
                    f"give those, or remove it to begin anew."
                )
            for one in told:
                self._take(one["rows"], one["dropped"])
        except (ValueError, KeyError, TypeError) as error:
            raise TrainError(
                f"{self.file} is damaged ({error}); remove it to begin anew."
            ) from error
        self.file.write_bytes(whole + b"\n")

    def add(self, rows: Sequence[Row], dropped: Counter[str]) -> None:
        line = {"request": self.num_requests, "rows": list(rows), "dropped": dict(dropped)}
        with self.file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._take(rows, dropped)

    def _take(self, rows: Sequence[Row], dropped: dict[str, int]) -> None:
        self.rows += rows
        self.dropped.update(dropped)
        self.num_requests += 1


@dataclass(frozen=True, slots=True)
class Diversity:
    """How much rows differ. Words of rows of one topic repeat; whole phrases should not."""

    num_rows: int
    distinct_pairs: float  # share of the pairs of neighbouring words in prompts that are new
    openings: float  # share of the prompts that begin with three words of their own
    nearest: float  # mean over prompts of the share of words in common with the nearest other
    mean_words: float  # of a completion


def generate(
    topic: str,
    count: int,
    write: Writer,
    file: Path,
    *,
    seed: int = 0,
    told: Callable[[int], None] = lambda num_rows: None,
) -> Journal:
    """Write `count` rows about a topic to a new file of JSON lines.

    Raises BadRequest for what cannot be asked, and TrainError if the model says nothing usable for
    too long: what it said before stays in the journal.
    """
    if not topic.strip() or count < 1:
        raise BadRequest("Expected a topic, and at least one row.")
    if file.exists() or file.suffix != ".jsonl":
        raise BadRequest(f"{file} must be a new file that ends in .jsonl; give another.")
    journal = Journal(file.with_name(file.name + ".part"), topic, seed)
    journal.open()
    useless = 0
    while len(journal.rows) < count:
        said = write(_prompt(journal), seed + journal.num_requests)
        rows, dropped = _fresh(said, journal.rows)
        journal.add(rows, dropped)
        useless = 0 if rows else useless + 1
        if useless == PATIENCE:
            raise _refusal(journal, count, said)
        told(min(len(journal.rows), count))
    with aside(file) as new:
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in journal.rows[:count])
        new.write_text("".join(lines), encoding="utf-8")
    journal.file.unlink()
    return journal


def diversity(rows: Sequence[Row]) -> Diversity:
    words = [_words(row["prompt"]) for row in rows]
    pairs = [pair for own in words for pair in pairwise(own)]
    sets = [set(own) for own in words]
    nearest = [
        max((_common(one, other) for m, other in enumerate(sets) if m != n), default=0.0)
        for n, one in enumerate(sets)
    ]
    return Diversity(
        num_rows=len(rows),
        distinct_pairs=len(set(pairs)) / max(1, len(pairs)),
        openings=len({tuple(own[:3]) for own in words}) / len(rows),
        nearest=sum(nearest) / len(rows),
        mean_words=sum(len(row["completion"].split()) for row in rows) / len(rows),
    )


def _prompt(journal: Journal) -> str:
    """What is asked: a function of the seed and of what is there, so a run can be repeated."""
    rng = random.Random(f"{journal.seed}/{journal.num_requests}")
    shown = rng.sample(journal.rows, min(5, len(journal.rows)))
    known = "".join(f"\n- {row['prompt'][:100]}" for row in shown)
    avoid = f"\nDo not ask what was asked already:{known}" if known else ""
    return (
        f"Write {PER_REQUEST} different questions about {journal.topic}, as asked by "
        f"{rng.choice(ANGLES)}, each with a correct and complete answer.{avoid}\n"
        f"Answer with nothing but a JSON list of the form "
        f'[{{"prompt": "the question", "completion": "the answer"}}].'
    )


def _fresh(said: str, known: Sequence[Row]) -> tuple[list[Row], Counter[str]]:
    """The rows of an answer that say something new, and why the others were dropped."""
    rows: list[Row] = []
    dropped: Counter[str] = Counter()
    seen = [set(_words(row["prompt"])) for row in known]
    for item in _items(said):
        problem = _problem(item)
        own = set() if problem else set(_words(item["prompt"]))
        if not problem and any(_common(own, other) >= NEAR for other in seen):
            problem = "said before"
        if problem:
            dropped[problem] += 1
        else:
            seen.append(own)
            rows.append({key: item[key].strip() for key in LONGEST})
    if not rows and not dropped:
        dropped["no JSON"] += 1
    return rows, dropped


def _items(said: str) -> Iterator[Any]:
    """The objects of an answer, one by one or in lists, whatever stands around them."""
    decoder, place, failures = json.JSONDecoder(), 0, 0
    while failures < MISTAKEN and (found := re.compile(r"[\[{]").search(said, place)):
        try:
            value, place = decoder.raw_decode(said, found.start())
        except (ValueError, RecursionError):
            place, failures = found.start() + 1, failures + 1
            continue
        yield from value if isinstance(value, list) else [value]


def _problem(item: Any) -> str:
    """What is wrong with a row; nothing if it can be learned."""
    if not isinstance(item, dict) or not all(isinstance(item.get(key), str) for key in LONGEST):
        return "no prompt and completion"
    if set(item) - set(LONGEST):
        return "other fields"
    if not all(_words(item[key]) for key in LONGEST):
        return "empty"
    if any(len(item[key]) > most for key, most in LONGEST.items()):
        return "too long"
    if _words(item["prompt"]) == _words(item["completion"]):
        return "an echo"
    if item["prompt"].strip().lower() == "the question":
        return "the example itself"
    return ""


def _refusal(journal: Journal, count: int, said: str) -> TrainError:
    reasons = ", ".join(f"{why} {n}" for why, n in journal.dropped.most_common())
    return TrainError(
        f"The model gave no new row in {PATIENCE} requests ({reasons}; at last it said "
        f"{said.strip()[:60]!r}). {len(journal.rows)} of {count} rows are in {journal.file}; try "
        f"a larger model, a wider topic or fewer rows."
    )


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _common(one: set[str], other: set[str]) -> float:
    return len(one & other) / max(1, len(one | other))
