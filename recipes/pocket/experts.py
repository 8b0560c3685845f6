"""The experts: one adapter a task, all learned in one pass over the finished base."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import torch

from loramix.adapter import Card
from loramix.chat import Example
from loramix.cli.train import work as train
from loramix.formats import peft
from loramix.library import Library
from loramix.train.plans import ExpertPlan
from loramix.train.recipe import read_plan
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


def learn(data: Path, pocket: Path, work: Path) -> None:
    """All five in one pass, into the library of `work`; one that was cut short goes on."""
    if set(TASKS) <= set(Library(work / "library").names()):
        return
    write_rows(data, work / "rows")
    places = [f"model_name_or_path={pocket / 'base'}", f"library={work / 'library'}"]
    places += [f"output_dir={work / 'experts'}"]
    for name in TASKS:
        places.append(f"experts.{name}.data={work / 'rows' / name}.jsonl")
        places.append(f"experts.{name}.eval_data={work / 'rows' / name}-validation.jsonl")
    train(read_plan(PLAN, places), resume=True)


def install(pocket: Path, work: Path) -> None:
    """Put the experts that were learned into the library of `pocket`, in bfloat16.

    Their scores are those of the report, and their cards show no rows: pocket passes on no text of
    MAWPS.
    """
    learned, shelf = Library(work / "library"), Library(pocket / "library")
    for name in TASKS:
        adapter = learned.load(name)
        pairs = {layer: pair.to(torch.bfloat16) for layer, pair in adapter.pairs.items()}
        own = card(name, learned.card(name))
        new = replace(adapter, pairs=pairs, digest=peft.digest(pairs), card=own)
        shelf.put(new, replace=True)


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


def card(name: str, learned: Card) -> Card:
    return Card(
        name=name,
        description=f"{planned()[name].description} Trained on {SOURCES[name]}.",
        skills=SKILLS[name],
        base="pocket",
        base_fingerprint=learned.base_fingerprint,
        licence=LICENCES[name],
    )
