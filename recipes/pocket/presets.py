"""What the presets do on pocket: one expert under each, on its own task and on others'."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from loramix.adapter import Adapter, Card
from loramix.base import Base, open_base
from loramix.chat import Example, Message
from loramix.engine.local import LocalEngine
from loramix.gates import Gates
from loramix.mix import Mix
from loramix.mixed import MixedModel
from loramix.train.batches import IGNORED, micro_batches
from loramix.train.config import Run
from loramix.train.data import Row, tokenise
from loramix.train.learner import Course
from loramix.train.loop import train
from loramix.train.measure import mean_loss
from loramix.train.presets import PRESETS
from loramix.train.recipe import plan
from recipes.pocket import judge
from recipes.pocket.tasks import TASKS, Task, load

TASK = "support"
LEARNED, ASKED, FOREIGN = 2000, 300, 60  # rows; FOREIGN of each other task
KEYS = {
    "model_name_or_path": "pocket",
    "output_dir": "unused",
    "data": "unused",
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.05,
    "per_device_train_batch_size": 16,
    "seed": 0,
}


@dataclass(frozen=True, slots=True)
class Effect:
    """What an expert does to answers on its task, and to text on anything else."""

    exact: judge.Score
    loss: float  # nats per token of other tasks' questions
    drift: float  # nats per token there: KL divergence of its next-token odds from the base's


def run(data: Path) -> None:
    """Train the expert under each preset and print the table."""
    base = replace(open_base("pocket", device="cpu"), id="pocket")
    task = load(TASK, data)
    foreign = _foreign(base, data)
    print("| preset | rank | alpha | epochs | exact match, own task | loss elsewhere | drift |")
    print("|---|---|---|---|---|---|---|")
    bare = mean_loss(base, [], foreign, [Mix()] * len(foreign))
    print(f"| (base) | | | | {_cell(_answered(base, [], task, Mix()))} | {bare:.3f} | 0 |")
    for name, preset in PRESETS.items():
        found = effect(base, _learned(base, task, name), task, foreign)
        print(
            f"| {name} | {preset.rank} | {preset.ratio * preset.rank:g} | {preset.epochs:g} "
            f"| {_cell(found.exact)} | {found.loss:.3f} | {found.drift:.3f} |",
            flush=True,
        )


def effect(base: Base, expert: Adapter, task: Task, foreign: Sequence[Row]) -> Effect:
    own = Mix({expert.name: 1.0})
    return Effect(
        _answered(base, [expert], task, own),
        mean_loss(base, [expert], foreign, [own] * len(foreign)),
        drift(base, expert, foreign),
    )


@torch.no_grad()
def drift(base: Base, expert: Adapter, rows: Sequence[Row]) -> float:
    """KL(base || expert) of the next token, in nats, over the learned tokens of rows."""
    mixed = MixedModel(base.model)
    mixed.bind(expert)
    total, tokens = 0.0, 0
    for batch in micro_batches([rows], tokens=4096):
        told = {"input_ids": batch.ids, "position_ids": batch.positions, "use_cache": False}
        with mixed.output_at(batch.labels != IGNORED):
            before = mixed.model(**told).logits.float().log_softmax(-1)
            with mixed.active.using(Gates((expert.name,), torch.ones(1, 1, 1))):
                after = mixed.model(**told).logits.float().log_softmax(-1)
        total += float((before.exp() * (before - after)).sum())
        tokens += len(before)
    mixed.release()
    return total / tokens


def _learned(base: Base, task: Task, preset: str) -> Adapter:
    (expert,) = plan({**KEYS, "name": TASK, "preset": preset}).experts
    examples = random.Random(1).sample(task.train, LEARNED)
    rows = [tokenise(base.tokenizer, e, expert.settings.max_length) for e in examples]
    course = Course(Card(TASK), rows, (), expert.settings)
    (adapter,) = train(base, [course], Run(micro_rows=expert.settings.batch_size))
    return adapter


def _answered(base: Base, adapters: Sequence[Adapter], task: Task, mix: Mix) -> judge.Score:
    rows = random.Random(3).sample(task.heldout, ASKED)
    with LocalEngine(base, adapters) as engine:
        found = judge.answers(engine, TASK, [e.query for e in rows], [mix] * ASKED)
    return judge.count(found, rows)


def _foreign(base: Base, data: Path) -> list[Row]:
    """Held-out questions of the other tasks, as plain text."""
    texts = [e.query for t in TASKS if t != TASK for e in load(t, data).heldout[:FOREIGN]]
    return [tokenise(base.tokenizer, Example((Message("assistant", t),)), 640) for t in texts]


def _cell(score: judge.Score) -> str:
    low, high = score.interval
    return f"{score.percent:.1f} % [{low:.1f}, {high:.1f}]"
