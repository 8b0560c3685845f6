"""Training as a whole: rows are read, experts learned, kept, routed to and judged."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from loramix.adapter import Adapter
from loramix.base import Base, open_base
from loramix.errors import AdapterError, TrainError
from loramix.export import check_export, export_experts
from loramix.formats.folder import PLOT, TRAINING
from loramix.library import Library
from loramix.lm import ROUTER, has_router
from loramix.material import Material, course_of, gather, shelf_of
from loramix.mix import Mix
from loramix.route.change import changing
from loramix.route.gate import GateRouter
from loramix.route.saved import state
from loramix.train.board import Board
from loramix.train.checkpoint import found
from loramix.train.forward import rounded_products
from loramix.train.learner import Course, account
from loramix.train.log import TrainerLog, entries
from loramix.train.loop import Progress, train
from loramix.train.measure import mean_loss
from loramix.train.plans import Plan
from loramix.train.plot import check_plots, loss_plot
from loramix.train.processes import Processes

LOG = "trainer_log.jsonl"


@dataclass(frozen=True, slots=True)
class Judged:
    """Nats per learned token of an expert's validation rows, under each choice of mix."""

    name: str
    num_rows: int
    base: float
    expert: float
    routed: float | None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run has made."""

    adapters: Sequence[Adapter]
    library: Library
    judged: Sequence[Judged]
    notes: Sequence[str]


def learn(
    plan: Plan,
    base: Base,
    materials: Sequence[Material],
    report: Callable[[Progress], None] = lambda progress: None,
    tell: Callable[[str], None] = lambda line: None,
    *,
    resume: bool = False,
) -> Outcome:
    """Train a plan's experts in one pass, put them on the shelf, refit the router, and judge.

    A plan that is to overwrite begins anew, unless `resume`: then it goes on from its checkpoint,
    and an expert that it had put on the shelf already is the one it puts there again.
    Raises AdapterError before anything is learned if the library has one of these names and the
    plan is not to overwrite it, TrainError, and Stopped.
    """
    shelf = shelf_of(plan)
    export = plan.export and replace(plan.export, overwrite=plan.overwrite or resume)
    if export:
        check_export(export)
    if not resume:
        _prepare(plan, shelf)
    plan.run.processes.wait()
    courses = [course_of(material, base) for material in materials]
    with _followed(plan, report) as told, rounded_products(wanted=plan.tf32):
        adapters = train(base, courses, plan.run, told)
    tell("Fitting the router ...")
    begun = state(shelf.folder / ROUTER)
    router = _router(shelf, materials) if plan.fit_router else None
    tell("Judging ...")
    judged = _judged(plan, base, materials, adapters, router)
    scores = {one.name: one for one in judged}
    kept = [_scored(adapter, scores.get(adapter.name)) for adapter in adapters]
    for adapter, course, material in zip(kept, courses, materials, strict=True):
        mine = plan.overwrite or (resume and _is_there(adapter, shelf))
        beside = _beside(plan, course, str(material.plan.source))
        shelf.put(adapter, replace=mine, beside=beside)
    models = export_experts(export, adapters) if export else []
    notes = [f"A whole model is in {folder}." for folder in models]
    if router:
        _save_router(router, begun, shelf, materials)
    elif plan.fit_router:
        notes.append("The router was not fitted: these rows ask nothing.")
    if plan.plot:
        (plan.output / PLOT).write_text(loss_plot(entries(plan.output / LOG)), encoding="utf-8")
    return Outcome(adapters, shelf, judged, notes)


def _prepare(plan: Plan, shelf: Library) -> None:
    """Make room for a run that begins, or find what it is to go on from."""
    check_names(plan, shelf)
    if plan.resume and not found(plan.output):
        raise TrainError(
            f"resume_from_checkpoint is true and {plan.output} has no checkpoint; leave it out."
        )
    if plan.begins_anew:
        _forget(plan.output)


def _beside(plan: Plan, course: Course, source: str) -> dict[str, str]:
    """What lies beside an expert's weights: how it was learned, and its losses."""
    files = {TRAINING: account(course, source)}
    if plan.plot:
        log = entries(plan.output / LOG)
        files[PLOT] = loss_plot([each for each in log if each["expert"] == course.card.name])
    return files


@contextmanager
def _followed(
    plan: Plan, report: Callable[[Progress], None]
) -> Iterator[Callable[[Progress], None]]:
    """Where each step is told: the log, TensorBoard if it is asked for, and the caller."""
    if plan.plot:
        check_plots()
    log = TrainerLog(plan.output / LOG, every=plan.log_every)
    board = Board(plan.board, every=plan.log_every) if plan.board else None
    listeners: list[Callable[[Progress], None]] = [log, report]
    if board:
        listeners.insert(1, board)

    def told(progress: Progress) -> None:
        for listener in listeners:
            listener(progress)

    try:
        yield told
    finally:
        if board:
            board.close()


def assist(plan: Plan, processes: Processes) -> None:
    """Be one of the other processes of a run: compute a part of each step, and write nothing."""
    base = open_planned(plan)
    materials = gather(plan, base)
    processes.wait()  # until the first one has emptied the folder of a run that begins anew
    courses = [course_of(material, base) for material in materials]
    run = replace(plan.run, processes=processes)
    with rounded_products(wanted=plan.tf32):
        adapters = train(base, courses, run)
    if run.sharded:
        _judged(replace(plan, run=run), base, materials, adapters)


def taken_up(plan: Plan) -> Plan:
    """The plan of a job that goes on: from its own newest checkpoint if it has one."""
    run = replace(plan.run, resume_from=None) if found(plan.output) else plan.run
    return replace(plan, run=run)


def open_planned(plan: Plan) -> Base:
    """A plan's base; one that is to be spread over processes on the CPU, as it may fit no GPU."""
    return open_base(
        plan.base,
        dtype=plan.dtype,
        device="cpu" if plan.run.sharded else "auto",
        revision=plan.revision,
        quantize=plan.quantize,
    )


def check_names(plan: Plan, shelf: Library) -> None:
    """AdapterError if the library has one of the names and the plan is not to overwrite it."""
    taken = sorted({expert.name for expert in plan.experts} & {*shelf.names()})
    if taken and not plan.overwrite:
        raise AdapterError(
            f"The library {shelf.folder} has {', '.join(taken)} already; give another name, or "
            f"overwrite it (overwrite_output_dir=true)."
        )


def _is_there(adapter: Adapter, shelf: Library) -> bool:
    return adapter.name in shelf.names() and shelf.load(adapter.name).digest == adapter.digest


def _forget(output: Path) -> None:
    for place in found(output):
        shutil.rmtree(place)
    (output / LOG).unlink(missing_ok=True)


def _router(shelf: Library, materials: Sequence[Material]) -> GateRouter | None:
    """The library's router once it knows the new experts too."""
    queries = {m.plan.name: m.queries for m in materials if m.queries}
    if not queries:
        return None
    if not has_router(shelf):
        return GateRouter.fit(queries)
    known = GateRouter.load(shelf.folder / ROUTER)
    for name, own in queries.items():
        known = known.add(name, own)
    return known.refit()


def _save_router(
    router: GateRouter, begun: tuple[int, int], shelf: Library, materials: Sequence[Material]
) -> None:
    """Replace the library's router, or whatever became of it since that state, grown alike."""
    folder = shelf.folder / ROUTER
    with changing(folder):
        newest = router if state(folder) == begun else _router(shelf, materials)
        if newest:
            newest.save(folder)


def _judged(
    plan: Plan,
    base: Base,
    materials: Sequence[Material],
    adapters: Sequence[Adapter],
    router: GateRouter | None = None,
) -> list[Judged]:
    """How well validation rows are known. All processes compute it of a base that they share."""
    found = []
    for material in materials:
        if material.validation:
            mixes = _mixes(material, adapters, router)
            if plan.run.sharded:
                mixes = plan.run.processes.agreed(mixes)
            found.append(_compared(base, material, adapters, mixes))
    return found


def _mixes(
    material: Material, adapters: Sequence[Adapter], router: GateRouter | None
) -> list[Mix] | None:
    """Where each validation row is routed to, if all of them are, and to these adapters."""
    if not router or any(len(s.example.messages) < 2 for s, _ in material.validation):
        return None
    mixes = [router.route(s.example.messages[:-1]).mix for s, _ in material.validation]
    here = {adapter.name for adapter in adapters}
    return mixes if all(set(mix) <= here for mix in mixes) else None


def _compared(
    base: Base, material: Material, adapters: Sequence[Adapter], mixes: Sequence[Mix] | None
) -> Judged:
    rows = [row for _, row in material.validation]
    own = Mix({material.plan.name: 1.0})
    return Judged(
        name=material.plan.name,
        num_rows=len(rows),
        base=mean_loss(base, adapters, rows, [Mix()] * len(rows)),
        expert=mean_loss(base, adapters, rows, [own] * len(rows)),
        routed=None if mixes is None else mean_loss(base, adapters, rows, mixes),
    )


def _scored(adapter: Adapter, judged: Judged | None) -> Adapter:
    if judged is None:
        return adapter
    scores: Mapping[str, float] = {
        "validation_loss": round(judged.expert, 4),
        "base_loss": round(judged.base, 4),
    }
    return replace(adapter, card=replace(adapter.card, scores=scores))
