"""What the experts of a run are learned from: rows as tokens, and adapters that they begin with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from loramix.adapter import Card
from loramix.base import Base
from loramix.chat import Example, Message
from loramix.folders import own_library
from loramix.formats import peft
from loramix.library import Library, check_fingerprint
from loramix.mixed import check_fit, linear_shapes
from loramix.train.begun import Begun, begin
from loramix.train.data import Row, understood, unknown_to
from loramix.train.dataset import (
    Loaded,
    Sample,
    accepted,
    load,
    load_hub,
    load_named,
    split,
    to_rows,
)
from loramix.train.files import Problem
from loramix.train.learner import Course
from loramix.train.plans import ExpertPlan, Plan, Source

EXAMPLES = 3  # queries that a card shows


@dataclass(frozen=True, slots=True)
class Material:
    """What one expert is learned from and judged by, and the rows that were left out."""

    plan: ExpertPlan
    learned: Sequence[tuple[Sample, Row]]
    validation: Sequence[tuple[Sample, Row]]
    problems: Sequence[Problem]
    notes: Sequence[str]
    begun: Begun = field(default_factory=Begun)

    @property
    def queries(self) -> list[str]:
        """What the router learns from: the last user turns."""
        return [
            sample.example.query for sample, _ in self.learned if len(sample.example.messages) > 1
        ]


def shelf_of(plan: Plan) -> Library:
    """The library the experts of a plan go to."""
    return Library(plan.library or own_library())


def gather(plan: Plan, base: Base) -> list[Material]:
    """The rows of every expert, as tokens, and the adapters it begins with.

    Raises TrainError if too many rows cannot be learned, FormatError and BaseMismatch for adapters
    that it cannot begin with.
    """
    return [_material(plan, expert, base) for expert in plan.experts]


def _begun(shelf: Library, expert: ExpertPlan, base: Base) -> Begun:
    """The adapters that an expert begins with, read."""
    if not expert.begins:
        return Begun()
    places = [shelf.locate(source) for source in expert.begins]
    adapters = [peft.read(place) for place in places]
    for adapter in adapters:
        check_fingerprint(adapter, base)
        check_fit(adapter, linear_shapes(base.model))
    scales = [peft.scale_of(*each) for each in zip(places, adapters, strict=True)]
    return begin(adapters, scales, expert.settings, new=expert.anew)


def _told(expert: ExpertPlan, begun: Begun) -> list[str]:
    """A line on what decides beside the training file."""
    if not begun.pairs:
        return []
    settings = begun.settings(expert.settings)
    return [
        f"{expert.name} goes on from {begun.names[-1]}, and has its layers, its rank "
        f"{settings.rank} and its scale {begun.scale:g}."
    ]


def _material(plan: Plan, expert: ExpertPlan, base: Base) -> Material:
    begun = _begun(shelf_of(plan), expert, base)
    told = _told(expert, begun)
    expert = replace(expert, settings=begun.settings(expert.settings))
    loaded = _read(expert.source, expert.max_samples)
    samples = [
        _with_system(s, plan.system)
        for s in accepted(loaded, str(expert.source), max_bad=plan.max_bad)
    ]
    notes = [*told, *loaded.notes]
    problems = [*loaded.problems]
    if expert.validation is not None:
        other = _read(expert.validation, None)
        learned: Sequence[Sample] = samples
        checked = accepted(other, str(expert.validation), max_bad=plan.max_bad)
        validation: Sequence[Sample] = [_with_system(s, plan.system) for s in checked]
        problems += other.problems
        notes += other.notes
    else:
        learned, validation = split(samples, expert.val_size, expert.settings.seed)
        if expert.val_size and not validation:
            notes.append(f"{expert.name}: val_size is less than one row; none is held out.")
    rows, bad = _tokens(plan, expert, base, learned)
    held, held_bad = _tokens(plan, expert, base, validation)
    cut = sum(len(row.ids) == expert.settings.max_length for _, row in rows)
    notes += unknown_to(base.tokenizer, plan.template)
    if cut and plan.truncate:
        notes.append(f"{cut} rows of {expert.name} fill or pass cutoff_len and may be cut.")
    return Material(expert, rows, held, [*problems, *bad, *held_bad], notes, begun)


def _read(source: Source, max_rows: int | None) -> Loaded:
    if source.file is not None:
        return load(source.file, max_rows=max_rows)
    if source.hub:
        return load_hub(source.hub, max_rows=max_rows)
    return load_named(source.names, source.folder, max_rows=max_rows, mixing=source.mixing)


def _tokens(
    plan: Plan, expert: ExpertPlan, base: Base, samples: Sequence[Sample]
) -> tuple[list[tuple[Sample, Row]], list[Problem]]:
    if not samples:
        return [], []
    rows, problems = to_rows(
        base.tokenizer,
        samples,
        min(expert.settings.max_length, base.context),
        learned=plan.learned,
        template=understood(base.tokenizer, plan.template),
        truncate=plan.truncate,
    )
    accepted(Loaded([s for s, _ in rows], problems), str(expert.source), max_bad=plan.max_bad)
    return rows, problems


def _with_system(sample: Sample, system: str) -> Sample:
    messages = sample.example.messages
    if not system or messages[0].role == "system" or len(messages) == 1:
        return sample
    return replace(sample, example=Example((Message("system", system), *messages)))


def course_of(material: Material, base: Base) -> Course:
    """What an expert is to learn, and its card as it begins."""
    expert = material.plan
    card = Card(
        name=expert.name,
        description=expert.description or f"Learned from {expert.source}.",
        examples=tuple(dict.fromkeys(material.queries))[:EXAMPLES],
        base=base.id,
        base_fingerprint=base.fingerprint,
    )
    rows, validation = ([r for _, r in part] for part in (material.learned, material.validation))
    return Course(card, rows, validation, expert.settings, material.begun)
