"""The experts: one adapter a task, learned from its training rows over the finished base."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import torch

from loramix.adapter import Card
from loramix.base import Base, open_base
from loramix.chat import Example
from loramix.formats import peft
from loramix.library import Library
from loramix.train.config import Run, Settings
from loramix.train.data import Row, tokenise
from loramix.train.learner import Course
from loramix.train.loop import Progress, train
from loramix.train.recipe import ExpertPlan, read_plan
from recipes.pocket.tasks import SOURCES, TASKS, Task, load, renumbered, review_parts, thinned

VALIDATION = 300  # rows taken from the end of a shuffle of the training rows, never the held-out
PLAN = Path(__file__).parent / "experts.yaml"
RENUMBERED = 2  # copies of each word problem with other numbers, beside the original
THINNED = 0.15  # share of the words left out in a second copy of each sentence on a film

SKILLS = {
    "support": ("intents", "orders", "refunds"),
    "banking": ("intents", "cards", "transfers"),
    "sentiment": ("polarity", "films"),
    "sql": ("sql", "courses", "students"),
    "math": ("arithmetic", "equations"),
}
LICENCES = {
    "support": "CDLA-Sharing-1.0",
    "banking": "CC-BY-4.0",
    "sentiment": "CC-BY-4.0",
    "sql": "CC-BY-4.0",
    "math": "MIT",
}


def build(name: str, data: Path, pocket: Path) -> None:
    """Train one expert into the library of `pocket`; done already if its folder is there."""
    library = Library(pocket / "library")
    if name in library.names():
        return
    base = open_base(str(pocket / "base"), device="cpu")
    base = replace(base, id="pocket")
    task = load(name, data)
    learned, validation = split(task, data)
    plan = planned()[name]
    settings = plan.settings
    print(f"{name}: {len(learned)} rows, {len(validation)} to validate, {settings}", flush=True)
    course = Course(
        card(task, base, plan.description),
        to_rows(base, learned, settings),
        to_rows(base, validation, settings),
        settings,
    )
    (adapter,) = train(base, [course], Run(bf16=True), report=show)
    pairs = {layer: pair.to(torch.bfloat16) for layer, pair in adapter.pairs.items()}
    library.put(replace(adapter, pairs=pairs, digest=peft.digest(pairs)))


def planned() -> dict[str, ExpertPlan]:
    """The experts as experts.yaml has them."""
    return {expert.name: expert for expert in read_plan(PLAN).experts}


def write_rows(data: Path, folder: Path) -> None:
    """What each expert learns, and is validated by, as the files that experts.yaml names."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in TASKS:
        learned, validation = split(load(name, data), data)
        for part, examples in ((name, learned), (f"{name}-validation", validation)):
            lines = [json.dumps({"prompt": e.query, "completion": e.answer}) for e in examples]
            (folder / f"{part}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def split(task: Task, data: Path) -> tuple[list[Example], list[Example]]:
    """Rows to learn, with what is added to them, and rows to choose the best state by."""
    rows = random.Random(1).sample(task.train, len(task.train))
    learned, validation = rows[:-VALIDATION], rows[-VALIDATION:]
    rng = random.Random(2)
    if task.name == "math":
        learned += [renumbered(e, rng) for e in learned for _ in range(RENUMBERED)]
    if task.name == "sentiment":
        learned += [thinned(e, THINNED, rng) for e in learned]
        learned += review_parts(task, data)
    return learned, validation


def to_rows(base: Base, examples: list[Example], settings: Settings) -> list[Row]:
    return [tokenise(base.tokenizer, example, settings.max_length) for example in examples]


def card(task: Task, base: Base, description: str) -> Card:
    return Card(
        name=task.name,
        description=f"{description} Trained on {SOURCES[task.name]}.",
        skills=SKILLS[task.name],
        base="pocket",
        base_fingerprint=base.fingerprint,
        licence=LICENCES[task.name],
    )


def show(progress: Progress) -> None:
    if progress.validation is not None or progress.step % 50 == 0:
        validation = "" if progress.validation is None else f" validation {progress.validation:.4f}"
        print(
            f"{progress.name} {progress.step}/{progress.num_steps} loss {progress.loss:.4f}"
            f"{validation} {progress.tokens_per_s:.0f} tokens/s",
            flush=True,
        )
