"""`loramix search`: rows with answers in, the mix that answers them best out."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from loramix.cli.flags import Json, Machine, Where
from loramix.cli.opening import open_base
from loramix.cli.printing import print_json
from loramix.cli.reading import read_answered
from loramix.errors import AdapterError, SearchError, UnknownAdapter
from loramix.folders import own_library
from loramix.library import Library
from loramix.mix import check_name

if TYPE_CHECKING:
    from loramix.base import Base
    from loramix.chat import Example
    from loramix.search import Found, Progress

Data = Annotated[
    Path, Option("--data", help='Lines like {"query": "...", "answer": "..."}, or "messages".')
]
PER_LAYER = "a weight per adapter and layer, written as one adapter"


@dataclass(frozen=True, slots=True)
class How:
    """What is searched for, and how."""

    objective: Annotated[str, Option(help="loss, exact, contains, f1 or module:function.")] = "loss"
    method: Annotated[str, Option(help="gradient, hill, grid, optuna or cmaes.")] = "gradient"
    adapters: Annotated[str | None, Option(help="a,b,c; default: all of the library.")] = None
    per_layer: Annotated[bool, Option("--per-layer", help=f"Find {PER_LAYER} (--name).")] = False
    budget: Annotated[float, Option(help="Trials: looks at one mix on all search rows.")] = 100
    seed: Annotated[int, Option(min=0, help="The same seed gives the same result.")] = 0
    name: Annotated[str | None, Option(help="Of the adapter that --per-layer writes.")] = None
    max_tokens: Annotated[
        int | None, Option(min=1, help="Longest answer; default: twice the longest reference.")
    ] = None


def search(where: Where, machine: Machine, how: How, data: Data, as_json: Json = False) -> None:
    """Search the mix that answers rows best, and say what it gains on rows held out."""
    from loramix.search.find import check

    check(how.method, how.budget)
    examples = read_answered(data)
    names = _names(how, where.shelf)
    target = _target(how, where)
    base = open_base(where, machine)
    found, mix = _find(how, where.shelf, base, names, examples, target)
    if as_json:
        print_json(_fields(found, mix, how))
    else:
        _print(found, mix, how, target)
    if found.ended == "interrupted":
        raise typer.Exit(130)


def _find(
    how: How,
    shelf: Library,
    base: Base,
    names: Sequence[str],
    examples: Sequence[Example],
    target: Library,
) -> tuple[Found, str]:
    """What was found, and the name by which it serves."""
    from loramix.search.gates import GateLoss
    from loramix.search.result import as_mix, refuse_dora, stacked

    if how.objective != "loss":
        found = _find_by_answers(how, shelf, base, names, examples)
        return found, str(as_mix(names, found.point))
    adapters = [shelf.load(name) for name in names]
    if how.per_layer:
        refuse_dora(adapters)
    with GateLoss(base, adapters, examples, per_layer=how.per_layer) as loss:
        found = _run(loss, examples, how)
        if not how.per_layer:
            return found, str(as_mix(loss.owners, found.point))
        adapter = stacked(loss, base, str(how.name), found)
    target.put(adapter)
    return found, adapter.name


def _find_by_answers(
    how: How, shelf: Library, base: Base, names: Sequence[str], examples: Sequence[Example]
) -> Found:
    from loramix.engine.local import LocalEngine
    from loramix.eval.answers import AnswerLoss, room_for
    from loramix.eval.metrics import find_metric

    metric = find_metric(how.objective)
    limit = how.max_tokens or room_for(base, examples)
    with LocalEngine(base, library=shelf) as engine:
        loss = AnswerLoss(engine, names, examples, metric, max_tokens=limit)
        return _run(loss, examples, how)


def _run(loss: Any, examples: Sequence[Example], how: How) -> Found:
    from loramix.search.find import find

    keys = [example.messages[:-1] for example in examples]
    with _shown(loss.owners, how) as report:
        return find(loss, keys, method=how.method, budget=how.budget, seed=how.seed, report=report)


@contextmanager
def _shown(owners: Sequence[str], how: How) -> Iterator[Callable[[Progress], None]]:
    """A bar on the terminal with the best so far."""
    if not sys.stderr.isatty():
        yield lambda progress: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f}"))
    said = TextColumn("{task.description}", markup=False)
    with Bar(*columns, TimeElapsedColumn(), said, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=how.budget)

        def report(progress: Progress) -> None:
            text = f"{progress.loss:.4f} {'' if how.per_layer else _named(owners, progress.best)}"
            bar.update(task, completed=progress.spent, description=text)

        yield report


def _named(owners: Sequence[str], point: Sequence[float]) -> str:
    from loramix.search.result import as_mix

    return str(as_mix(owners, point))


def _names(how: How, shelf: Library) -> list[str]:
    """The adapters to mix, checked before a model is opened."""
    known = shelf.names()
    names = sorted(dict.fromkeys(how.adapters.split(","))) if how.adapters is not None else known
    for name in names:
        if name not in known:
            raise UnknownAdapter(name, known)
    if not names:
        raise SearchError(f"The library {shelf.folder} has no adapters to mix; add some first.")
    return names


def _target(how: How, where: Where) -> Library:
    """Where an adapter would be written: the library that is named, else your own."""
    target = Library(where.library or own_library())
    if how.per_layer != (how.name is not None):
        raise SearchError("--per-layer writes an adapter: give both --per-layer and --name.")
    if how.per_layer and how.objective != "loss":
        raise SearchError("--per-layer searches by gates; it needs --objective loss.")
    if how.name is not None and check_name(how.name) in target.names():
        raise AdapterError(f"{target.folder} has an adapter {how.name!r}; give another --name.")
    return target


def _fields(found: Found, mix: str, how: How) -> dict[str, Any]:
    fields = asdict(found)
    del fields["point"], fields["start_point"]
    fields["num_rows"] = dict(zip(("fit", "choose", "held"), found.num_rows, strict=True))
    proven = {"is_proven": found.gain.is_proven}
    return {"mix": mix, "objective": how.objective, "method": how.method, **fields, **proven}


def _print(found: Found, mix: str, how: How, target: Library) -> None:
    fit, choose, held = found.num_rows
    typer.echo(mix)
    unit = "nats per token" if how.objective == "loss" else f"1 - {how.objective}"
    typer.echo(f"  {held} rows held out, in {unit} (less is better):")
    rows = {"base": found.base_loss, found.start: found.start_loss, "found": found.loss}
    for name, value in rows.items():
        typer.echo(f"  {value:8.4f}  {name}")
    gain = found.gain
    span = f"{gain.mean:.4f} (95 %: {gain.low:.4f} to {gain.high:.4f})"
    if gain.is_proven:
        typer.echo(f"  It gains {span} over {found.start}, the best without a search.")
    else:
        typer.echo(f"  No proven gain over {found.start}: {span}. Keep {found.start}.")
    typer.echo(
        f"  {found.trials:.1f} trials by {how.method} on {fit} rows, {choose} to choose by; "
        f"ended: {found.ended}; {found.seconds:.1f} s."
    )
    if how.per_layer:
        typer.echo(f"  Written to {target.folder / mix}.")
