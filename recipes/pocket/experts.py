"""The experts: one adapter a task, learned from its training rows over the finished base."""

from __future__ import annotations

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
from recipes.pocket.tasks import SOURCES, Task, load, renumbered, review_parts, thinned

VALIDATION = 300  # rows taken from the end of a shuffle of the training rows, never the held-out
COMMON = Settings(rank=32, rate=2e-3, batch_size=32, max_length=640)
SETTINGS = {
    "support": replace(COMMON, epochs=3),
    "banking": replace(COMMON, epochs=7),
    "sentiment": replace(COMMON, epochs=2, rate=1e-3),
    "sql": replace(COMMON, epochs=10),
    "math": replace(COMMON, epochs=3),
}
RENUMBERED = 2  # copies of each word problem with other numbers, beside the original
THINNED = 0.15  # share of the words left out in a second copy of each sentence on a film

DESCRIPTIONS = {
    "support": (
        "Names the intent of a customer-support request.",
        ("intents", "orders", "refunds"),
    ),
    "banking": ("Names the intent of a question to a bank.", ("intents", "cards", "transfers")),
    "sentiment": (
        "Says whether a sentence on a film is positive or negative.",
        ("polarity", "films"),
    ),
    "sql": ("Writes the SQL for a question to a course catalogue.", ("sql", "courses", "students")),
    "math": ("Writes the equation that solves a word problem.", ("arithmetic", "equations")),
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
    settings = SETTINGS[name]
    print(f"{name}: {len(learned)} rows, {len(validation)} to validate, {settings}", flush=True)
    course = Course(
        card(task, base),
        to_rows(base, learned, settings),
        to_rows(base, validation, settings),
        settings,
    )
    (adapter,) = train(base, [course], Run(bf16=True), report=show)
    pairs = {layer: pair.to(torch.bfloat16) for layer, pair in adapter.pairs.items()}
    library.put(replace(adapter, pairs=pairs, digest=peft.digest(pairs)))


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


def card(task: Task, base: Base) -> Card:
    description, skills = DESCRIPTIONS[task.name]
    return Card(
        name=task.name,
        description=f"{description} Trained on {SOURCES[task.name]}.",
        skills=skills,
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
