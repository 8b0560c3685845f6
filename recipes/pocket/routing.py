"""The router of pocket, fitted from the experts' own rows."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path

from loramix.chat import Example, Message
from loramix.route.calibration import tuned
from loramix.route.gate import GateRouter
from loramix.route.ngrams import NgramEncoder
from recipes.pocket.tasks import TASKS, load, rows, svamp

ROWS = 4000  # of each task, at most
KEEP = 0.98  # of an expert's queries stay, and 86 % of validation strangers leave; at .985 84 %


def build(data: Path, pocket: Path) -> None:
    """Fit on n-grams alone, so that a plain installation can use it; skipped if it is there."""
    folder = pocket / "library" / "_router"
    if folder.exists():
        return
    examples = {name: queries(name, data) for name in TASKS}
    router = GateRouter.fit(examples, encoder=NgramEncoder(), keep=KEEP)
    tuned(router, {"math": unshipped("math", data)}).save(folder)


def queries(name: str, data: Path) -> list[str]:
    """Training questions of a task that may be stored in the package.

    The router keeps its rows, and pocket passes on no text of MAWPS: for math it learns from SVAMP,
    filled up with GSM8K, which ask alike. What it must keep is then set by the rows left out.
    """
    rng = random.Random(3)
    found = [e.query for e in load(name, data).train if may_ship(e, data)]
    found = rng.sample(found, min(ROWS, len(found)))
    if name == "math":
        gsm8k = rows(data / "math/gsm8k.jsonl.gz")
        more = [r["question"] for r in gsm8k if r["split"] == "train"]
        found += rng.sample(more, ROWS - len(found))
    return found


def unshipped(name: str, data: Path) -> list[str]:
    """The other training questions of a task."""
    return [e.query for e in load(name, data).train if not may_ship(e, data)]


def may_ship(example: Example, data: Path) -> bool:
    """Whether a row's text may be part of the package: all but MAWPS's word problems."""
    return example.adapter != "math" or example.query in _svamp_questions(data)


@cache
def _svamp_questions(data: Path) -> frozenset[str]:
    return frozenset(text for text, _ in svamp(data))


def foreign(data: Path, split: str = "oos_test") -> list[str]:
    """CLINC150's out-of-scope queries: nobody's task. The router never learns from CLINC150."""
    found = rows(data / "clinc150/data_full.jsonl.gz")
    return [r["text"] for r in found if r["split"] == split]


def write_rows(data: Path, out: Path, count: int) -> None:
    """Rows for `loramix route`: train.jsonl to fit on, and two files that nobody has learned.

    labelled.jsonl, to evaluate on, has `count` rows of each task and twice as many of nobody;
    answered.jsonl has `count` others of each task with their answers; train.jsonl four times those.
    """
    rng = random.Random(5)
    learned = [
        {"text": text, "route": name}
        for name in TASKS
        for text in filter(str.isprintable, queries(name, data)[: 4 * count])
    ]
    labelled = [{"text": text, "route": None} for text in foreign(data)[: 2 * count]]
    answered = []
    for name in TASKS:
        found = rng.sample(load(name, data).heldout, 2 * count)
        labelled += [{"text": e.query, "route": name} for e in found[:count]]
        answered += [{"query": e.query, "answer": e.answer, "adapter": name} for e in found[count:]]
    out.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", learned), ("labelled", labelled), ("answered", answered)):
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), "utf-8")


def user(text: str) -> tuple[Message, ...]:
    return (Message("user", text),)
