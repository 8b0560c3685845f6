"""`loramix train`: experts from a training file, or one from a file of rows."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from loramix.cli.bars import bars
from loramix.cli.opening import hush, import_quickly, no_collection, notice
from loramix.cli.printing import print_table
from loramix.cli.rows import show_row
from loramix.errors import BadRequest
from loramix.folders import own_library
from loramix.library import Library
from loramix.train.plans import Export, Plan
from loramix.train.plot import CAN_PLOT
from loramix.train.processes import is_sharded_by_launcher, num_launched
from loramix.train.recipe import merging, plan, read_plan, read_values

if TYPE_CHECKING:
    from loramix.jobs import Judged, Outcome
    from loramix.material import Material
    from loramix.train.feed import Feed
    from loramix.train.loop import Progress

# What `--data` alone means: settings that suit some hundred rows, and a tenth of them held out.
SMALL = {
    "preset": "balanced",
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.05,
    "per_device_train_batch_size": 16,
    "val_size": 0.1,
    "load_best_model_at_end": True,
    "disable_gradient_checkpointing": True,
    "save_strategy": "epoch",
    "cutoff_len": 1024,
    "plot_loss": CAN_PLOT,
    "seed": 0,
}
Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="[CONFIG.yaml] [KEY=VALUE ...]", help="Training file and changes."),
]


def train(
    words: Words = None,
    data: Annotated[Path | None, Option(help="File of rows, instead of a training file.")] = None,
    name: Annotated[str | None, Option(help="The expert's name, with --data.")] = None,
    base: Annotated[str, Option(help="Folder, hub id, or pocket; with --data.")] = "pocket",
    library: Annotated[Path | None, Option(help="Folder of adapters it goes to.")] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Say what would be done.")] = False,
    preset: Annotated[
        str | None, Option(help="How strongly it biases: gentle, balanced or override.")
    ] = None,
    preview: Annotated[int, Option(help="Show so many rows, and what of them is learned.")] = 0,
    detach: Annotated[
        bool, Option("--detach", help="In a process of its own; see `loramix jobs`.")
    ] = False,
) -> None:
    """Train one or several experts in one pass, then fit the router and compare."""
    if detach and num_launched() > 1:
        raise BadRequest("--detach under a launcher would begin a job each; use processes=N.")
    words = [*([f"preset={preset}"] if preset else []), *(words or [])]
    if data is None and name is None and (asked := _merging(words)):
        if dry_run or preview or detach:
            raise BadRequest("This file merges and trains nothing; give it without such flags.")
        _merge(asked, Library(library or own_library()))
        return
    found = planned(words, data, name, base, library)
    if not detach:
        work(found, dry_run=dry_run, preview=preview)
        return
    if dry_run or preview:
        raise BadRequest("--dry-run and --preview show something here; give them without --detach.")
    from loramix.cli.jobs import begin

    settings = {"words": words, "data": data, "name": name, "base": base, "library": library}
    begin(
        ", ".join(expert.name for expert in found.experts),
        {key: str(v) if isinstance(v, Path) else v for key, v in settings.items()},
    )


def _merging(words: list[str]) -> Export | None:
    """What the training file asks for if it merges adapters and trains nothing."""
    files = [Path(word) for word in words if "=" not in word]
    changes = [word for word in words if "=" in word]
    return merging(read_values(files[0], changes)) if len(files) == 1 else None


def _merge(asked: Export, library: Library) -> None:
    hush()
    with notice(f"Merging {', '.join(asked.adapters)} ..."), no_collection():
        from loramix.export import export_adapters

        place = export_adapters(asked, library)
    typer.echo(f"{', '.join(asked.adapters)} and {asked.base} as one model in {place}")


def planned(
    words: list[str], data: Path | None, name: str | None, base: str, library: Path | None
) -> Plan:
    """What these words of a command line ask for."""
    found = _plan(words, data, name, base)
    return found if library is None else replace(found, library=library)


def work(
    found: Plan,
    *,
    dry_run: bool = False,
    preview: int = 0,
    resume: bool = False,
    feed: Feed | None = None,
) -> None:
    """Do what was planned, telling how it goes; `resume` keeps the checkpoints in any case.

    `feed` is told what the terminal is, for those who follow from elsewhere.
    """
    hush(bars=sys.stderr.isatty() and found.base != "pocket")
    from loramix.jobs import assist, taken_up
    from loramix.train.processes import together

    if resume:
        found = taken_up(found)
    found = _spread(found)
    with together(1 if dry_run else found.processes, partial(assist, found)) as processes:
        if processes.is_first:
            own = replace(found, run=replace(found.run, processes=processes))
            _lead(own, dry_run=dry_run, preview=preview, resume=resume, feed=feed)
        elif not dry_run:  # one of those that a launcher began
            with _stopping(alone=False) as stopped:
                assist(replace(found, run=replace(found.run, stopped=stopped)), processes)


def _spread(found: Plan) -> Plan:
    """The plan with a base that is spread over its processes if it or the launcher says so."""
    asked = found.run.sharded or is_sharded_by_launcher()
    several = max(found.processes, num_launched()) > 1
    notes = found.notes
    if asked and not several:
        notes = (*notes, "fsdp is passed over: there is one process to hold the base.")
    return replace(found, run=replace(found.run, sharded=asked and several), notes=notes)


def _lead(found: Plan, *, dry_run: bool, preview: int, resume: bool, feed: Feed | None) -> None:
    """What the only process of a run does, or the first of several."""
    from loramix.jobs import learn, open_planned
    from loramix.material import gather
    from loramix.train.memory import estimate, free_bytes, num_trained

    with notice(f"Opening {found.base} ..."), no_collection():
        import_quickly()
        opened = open_planned(found)
    with notice("Reading rows ..."):
        materials = gather(found, opened)
    _tell(found, materials)
    if preview:
        for material in materials:
            for sample, row in material.learned[:preview]:
                show_row(opened.tokenizer, sample, row)
    settings = [material.plan.settings for material in materials]
    rows = [[row for _, row in material.learned] for material in materials]
    judged = [[row for _, row in material.validation] for material in materials]
    needed = estimate(opened, settings, found.run, rows, judged)
    typer.echo(f"Memory: {needed}.", err=not dry_run)
    if warning := needed.warning(free_bytes(opened)):
        typer.echo(warning, err=True)
    if dry_run:
        _print_plan(found, materials, [num_trained(opened, one) for one in settings])
        return
    alone = found.run.processes.count == 1
    with _stopping(alone=alone) as stopped, bars() as shown:
        run = replace(found.run, stopped=stopped)
        report, tell = _told(shown, feed)
        outcome = learn(replace(found, run=run), opened, materials, report, tell, resume=resume)
    if feed:
        feed.tell("judged", experts=[asdict(one) for one in outcome.judged])
    _print_outcome(outcome)


def _told(
    shown: Callable[[Progress], None], feed: Feed | None
) -> tuple[Callable[[Progress], None], Callable[[str], None]]:
    """Where steps and lines of what is done go: the terminal, and the feed if there is one."""
    if feed is None:
        return shown, lambda line: None

    def report(progress: Progress) -> None:
        shown(progress)
        feed.progress(progress)

    return report, lambda line: feed.tell("note", text=line)


def _plan(words: list[str], data: Path | None, name: str | None, base: str) -> Plan:
    files = [word for word in words if "=" not in word]
    changes = [word for word in words if "=" in word]
    if len(files) + (data is not None) != 1:
        raise BadRequest("Give one training file, or --data with a file of rows.")
    if files:
        if name is not None:
            raise BadRequest("--name is for --data; in a training file the key is name.")
        return read_plan(Path(files[0]), changes)
    if name is None:
        raise BadRequest("--data needs --name: what the expert is to be called.")
    output = own_library().parent / "training" / name
    values: dict[str, Any] = {
        **SMALL,
        "data": str(data),
        "name": name,
        "model_name_or_path": base,
        "output_dir": str(output),
    }
    return plan({**values, **_values(changes)})


def _values(changes: list[str]) -> dict[str, Any]:
    import yaml

    return {word.partition("=")[0]: yaml.safe_load(word.partition("=")[2]) for word in changes}


def _tell(found: Plan, materials: list[Material]) -> None:
    for note in found.notes:
        typer.echo(note, err=True)
    for material in materials:
        for note in material.notes:
            typer.echo(note, err=True)
        if material.problems:
            from loramix.train.dataset import listed

            typer.echo(
                f"{material.plan.name}: {len(material.problems)} rows left out: "
                f"{listed(material.problems)}.",
                err=True,
            )


def _print_plan(found: Plan, materials: list[Material], trained: list[int]) -> None:
    print_table(
        ("expert", "rows", "validation", "tokens", "steps", "parameters", "settings"),
        [
            (
                m.plan.name,
                str(len(m.learned)),
                str(len(m.validation)),
                str(sum(len(row.ids) for _, row in m.learned)),
                str(m.plan.settings.num_steps(len(m.learned))),
                f"{count:,}",
                f"rank {m.plan.settings.rank}, rate {m.plan.settings.rate:g}, "
                f"{m.plan.settings.batch_size} rows a step, {m.plan.settings.schedule}",
            )
            for m, count in zip(materials, trained, strict=True)
        ],
    )
    typer.echo(f"Nothing was trained; without --dry-run it goes to {found.output}.")


def _print_outcome(outcome: Outcome) -> None:
    for note in outcome.notes:
        typer.echo(note, err=True)
    names = ", ".join(adapter.name for adapter in outcome.adapters)
    if outcome.judged:
        titles = ("expert", "validation rows", "base", "expert alone", "routed")
        print_table(titles, [_cells(one) for one in outcome.judged])
        typer.echo("Nats per learned token; lower is better.", err=True)
    typer.echo(f"{names} in {outcome.library.folder}")


def _cells(one: Judged) -> tuple[str, ...]:
    routed = "-" if one.routed is None else f"{one.routed:.4f}"
    return one.name, str(one.num_rows), f"{one.base:.4f}", f"{one.expert:.4f}", routed


@contextmanager
def _stopping(*, alone: bool) -> Iterator[Any]:
    """Whether the first Ctrl-C or SIGTERM came: then a checkpoint is written. The second kills.

    Not beside other processes: a launcher hands on what the terminal has sent them already.
    """
    asked: list[int] = []

    def ask(number: int, frame: object) -> None:
        asked.append(number)
        if alone:
            signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
