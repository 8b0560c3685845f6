"""`loramix route fit` and `calibrate`: what a router learns, and what it leaves to the base."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer
from typer import Option

from loramix.cli.adapters import open_encoder
from loramix.cli.flags import Machine, Where
from loramix.cli.opening import notice, open_lm
from loramix.cli.reading import read_answered, read_labelled
from loramix.errors import BadRequest, UnknownAdapter
from loramix.folders import own_library
from loramix.formats.aside import aside
from loramix.library import Library
from loramix.lm import ROUTER, guided

if TYPE_CHECKING:
    from loramix.chat import Example
    from loramix.eval.quality import Interval
    from loramix.eval.targets import Targets
    from loramix.lm import LM
    from loramix.route.gate import GateRouter

Rows = Annotated[
    Path, typer.Argument(help='Lines like {"text": "...", "route": "sql"}; null for the base.')
]
Out = Annotated[Path, Option(help="Folder of the router; replaced if it is one.")]


def fit(
    where: Where,
    machine: Machine,
    data: Annotated[
        Path | None,
        typer.Argument(help='Lines like {"text": "...", "route": "sql"}; without, by cards alone.'),
    ] = None,
    out: Annotated[
        Path | None, Option(help="Folder of a router by itself; default: your library's router.")
    ] = None,
    keep: Annotated[float, Option(help="Share of own queries to keep from the base.")] = 0.95,
    top: Annotated[int, Option(help="Most adapters in one mix.")] = 2,
    fade: Annotated[bool, Option("--fade", help="Weights shrink with P(none).")] = False,
    encoder: Annotated[str, Option(help="auto, ngrams or minilm.")] = "auto",
    measure: Annotated[
        Path | None, Option(help='Rows with "query" and "answer" that no adapter has learned.')
    ] = None,
    targets: Annotated[
        Path | None, Option(help="Write what --measure found, a row a line.")
    ] = None,
) -> None:
    """Fit a router from labelled rows; rows of no adapter teach it what to leave to the base.

    With --measure the model says who answers half of its rows best, and the router learns that,
    unless it costs anything on the other half. In a library, adapters without rows start by their
    cards.
    """
    from loramix.route.abstain import background
    from loramix.route.change import changing
    from loramix.route.gate import GateRouter

    if data is None and (out or measure):
        raise BadRequest("--out and --measure need labelled rows; a library's cards do without.")
    shelf = None if out else Library(where.library or own_library())
    place = out or (where.library or own_library()) / ROUTER
    _check_out(place)
    if targets is not None and (measure is None or targets.exists()):
        raise BadRequest("--targets needs --measure, and a file that does not exist yet.")
    own, foreign = _read(data) if data else ({}, [])
    if shelf:
        _check_names([*own], shelf)
    cards = shelf.cards() if shelf else []
    chosen = open_encoder(encoder)

    def fitted(examples: Mapping[str, Sequence[str]]) -> GateRouter:
        rows = {name: texts for name, texts in examples.items() if name}
        more = [*background(), *examples.get("", ())]
        made = GateRouter.fit(rows, encoder=chosen, keep=keep, top=top, foreign=more, cards=cards)
        return replace(made, fades=fade)

    examples = {**own, "": foreign}
    if measure is None:
        with notice("Fitting the router ..."):
            router = fitted(examples)
    else:
        answered = read_answered(measure)
        with open_lm(where, machine) as lm:
            router = _measured(lm, answered, examples, fitted, targets)
    with changing(place):
        router.save(place)
    typer.echo(f"Fitted {place} to {', '.join(router.adapters)}.", err=True)
    for name in sorted(router.cards):
        typer.echo(f"{name} has no examples: it is known by its card.", err=True)


def calibrate(
    data: Rows,
    out: Out,
    where: Where,
    router: Annotated[
        Path | None, Option(help="Folder of a router; default: the library's.")
    ] = None,
    keep: Annotated[
        float | None, Option(help="Share of own queries to keep; default: as it was fitted.")
    ] = None,
    oos_recall: Annotated[
        float | None, Option(help="Share of the rows of nobody that must go to the base.")
    ] = None,
    keep_of: Annotated[
        list[str] | None,
        Option(metavar="NAME=SHARE", help="The share of one adapter; repeatable."),
    ] = None,
    threshold: Annotated[
        list[str] | None,
        Option(metavar="NAME=SCORE", help="Least in-scope score of one adapter; repeatable."),
    ] = None,
) -> None:
    """Set what a router leaves to the base by rows it has not learned, and say what is reached."""
    from loramix.route.calibration import calibrated, tuned, with_thresholds
    from loramix.route.change import changing
    from loramix.route.gate import GateRouter

    _check_out(out)
    if keep is not None and oos_recall is not None:
        raise BadRequest("--keep and --oos-recall are two ways to say one thing; give one.")
    own, foreign = _read(data)
    with changing(out), notice("Calibrating the router ..."):
        found = GateRouter.load(router or where.shelf.folder / ROUTER)
        found = calibrated(found, own, foreign, keep=keep, oos_recall=oos_recall)
        for name, share in _numbers("--keep-of", keep_of):
            if name not in own:
                raise BadRequest(f"--keep-of {name}: {data} has no row of {name}.")
            found = tuned(found, {name: own[name]}, keep=share)
        found = with_thresholds(found, dict(_numbers("--threshold", threshold)))
        found.save(out)
    _print_coverage(found, own, foreign)


def _check_out(out: Path) -> None:
    if out.exists() and not (out / "router.json").is_file():
        raise BadRequest(f"{out} exists and is no router; name another folder.")


def _read(data: Path) -> tuple[dict[str, list[str]], list[str]]:
    """Queries by adapter, and those of nobody."""
    examples: dict[str, list[str]] = {}
    for row in read_labelled(data):
        if len(row.routes) > 1:
            raise BadRequest(f"{row.text[:80]!r} has several routes; expected rows of one.")
        examples.setdefault("".join(row.routes), []).append(row.text)
    return examples, examples.pop("", [])


def _numbers(flag: str, given: Sequence[str] | None) -> Iterator[tuple[str, float]]:
    for text in given or ():
        name, _, number = text.partition("=")
        try:
            yield name, float(number)
        except ValueError:
            raise BadRequest(f"{flag} {text}: expected NAME=NUMBER, like sql=0.9.") from None


def _print_coverage(
    router: GateRouter, own: Mapping[str, Sequence[str]], foreign: Sequence[str]
) -> None:
    """What share of the rows is above each threshold."""
    from loramix.route.calibration import stays

    thresholds = dict(zip(router.adapters, router.abstain.thresholds, strict=True))
    for name, queries in sorted(own.items()):
        kept = stays(router, queries)
        typer.echo(
            f"{kept:6.1%} of {len(queries):5} stay  {name} (threshold {thresholds[name]:.2f})"
        )
    if foreign:
        left = 1 - stays(router, foreign)
        typer.echo(f"{left:6.1%} of {len(foreign):5} of nobody go to the base")


class Learned(NamedTuple):
    """The gaps to the oracle before and after the measured rows were learned."""

    before: Interval
    after: Interval


def _measured(
    lm: LM,
    answered: Sequence[Example],
    examples: Mapping[str, Sequence[str]],
    fitted: Callable[[Mapping[str, Sequence[str]]], GateRouter],
    file: Path | None,
) -> GateRouter:
    """A router that learned half of the measured rows, if that closes its gap on the other half."""
    from loramix.eval.targets import Ruler, oracle_gap, taught

    names = [name for name in examples if name]
    _check_names(names, lm.library)
    if len(answered) < 4:
        raise BadRequest(f"{len(answered)} rows are too few to measure; give 4 at least.")
    ruler = Ruler(
        lm.engine, answered, lambda turns, mix: guided(turns, mix, lm.library.system_prompt)
    )
    with _counted(len(answered)) as report:
        targets = ruler.targets(names, report)
    if file is not None:
        _write(file, answered, targets)
    texts = [example.query for example in answered]
    lessons, judged = slice(0, None, 2), range(1, len(answered), 2)
    hidden = {name: [t for t in group if t not in {*texts}] for name, group in examples.items()}
    with notice("Fitting the router twice ..."):
        plain = fitted(hidden)
        learned = fitted(taught(hidden, texts[lessons], targets.take(lessons)))
        rest = targets.take(slice(1, None, 2))
        gaps = Learned(*(oracle_gap(ruler.routed(each, judged), rest) for each in (plain, learned)))
    _print_measured(answered, targets, gaps)
    return learned if gaps.after.mean <= gaps.before.mean else plain


def _check_names(names: Sequence[str], library: Library) -> None:
    known = library.names()
    for name in names:
        if name not in known:
            raise UnknownAdapter(name, known)


def _print_measured(answered: Sequence[Example], targets: Targets, gaps: Learned) -> None:
    best = targets.best
    for label in sorted({example.adapter for example in answered}):
        mine = [b for b, example in zip(best, answered, strict=True) if example.adapter == label]
        right, none = sum(b == label for b in mine), sum(not b for b in mine)
        typer.echo(
            f"{label or '(no label)'}: {right} of {len(mine)} rows are answered best by it, "
            f"{none} by the base, {len(mine) - right - none * bool(label)} by another adapter"
        )
    shared = float(((targets.shares.max(axis=1)) < 0.75).mean())
    typer.echo(f"{shared:.1%} of the rows have no clear owner (a target below three quarters)")
    for name, gap in (("labels alone", gaps.before), ("with what was measured", gaps.after)):
        span = f"[{gap.low:.3f}, {gap.high:.3f}]"
        typer.echo(f"{gap.mean:8.3f} {span} nats an answer over the oracle, {name}")
    kept = "learned" if gaps.after.mean <= gaps.before.mean else "not learned: it costs more"
    typer.echo(f"What was measured is {kept}.")


def _write(file: Path, answered: Sequence[Example], targets: Targets) -> None:
    names = (*targets.adapters, "base")
    with aside(file) as new, new.open("w", encoding="utf-8") as lines:
        for example, nats, shares in zip(answered, targets.nats, targets.shares, strict=True):
            row = {
                "query": example.query,
                "adapter": example.adapter,
                "nats": dict(zip(names, nats.tolist(), strict=True)),
                "target": dict(zip(names, shares.tolist(), strict=True)),
            }
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")


@contextmanager
def _counted(rows: int) -> Iterator[Callable[[int], None]]:
    """A bar on the terminal."""
    if not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("Measuring", total=rows)
        yield lambda done: bar.update(task, completed=done)
