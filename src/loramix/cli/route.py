"""`loramix route`: the mix for a text, and how well a router does on labelled rows."""

from __future__ import annotations

import math
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import typer
from typer.core import TyperGroup

from loramix.cli.asking import ask_server
from loramix.cli.fitting import calibrate, fit
from loramix.cli.flags import Json, Machine, Where, flags
from loramix.cli.opening import notice, open_base
from loramix.cli.printing import decision_fields, print_json
from loramix.cli.reading import read_labelled, read_stdin
from loramix.errors import BadRequest
from loramix.lm import ROUTER, as_messages, load_router
from loramix.routers import KINDS, open_router

if TYPE_CHECKING:
    from loramix.route.report import Figure, Report


SERVER = "http://127.0.0.1:8000"  # where `loramix serve` listens by itself


class TextOrCommand(TyperGroup):
    """A group whose first word may be a text: `route "my card"` means `route text "my card"`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or args[0] not in {*self.commands, "--help"}:
            args = ["text", *args]
        return super().parse_args(ctx, args)


route = typer.Typer(
    cls=TextOrCommand,
    help='Say which mix would answer a text: loramix route "my card was stolen".',
)


@route.command("text", hidden=True)
@flags
def text_(
    where: Where,
    text: Annotated[str | None, typer.Argument(help="What to route; - reads stdin.")] = None,
    as_json: Json = False,
) -> None:
    """Say which mix would answer a text, and why."""
    if text is None:
        raise BadRequest('Expected a text, or - for stdin: loramix route "...".')
    messages = as_messages(read_stdin() if text == "-" else text)
    decision = load_router(where.shelf).route(messages)
    if as_json:
        print_json(decision_fields(decision))
        return
    typer.echo(str(decision.mix))
    ranked = sorted(decision.scores.items(), key=lambda item: -item[1])
    for name, score in [*ranked, ("(none)", decision.none)]:
        typer.echo(f"  {score:6.1%}  {name}")
    for reason in decision.reasons:
        typer.echo(f"  {reason}")


@route.command("eval")
@flags
def eval_(
    data: Annotated[
        Path, typer.Argument(help='Lines like {"text": "...", "route": "sql"}; null for the base.')
    ],
    where: Where,
    machine: Machine,
    router: Annotated[
        str, typer.Option(metavar="KIND|FOLDER", help=f"What to measure: {KINDS}.")
    ] = "auto",
    compare: Annotated[
        str | None, typer.Option(metavar="KIND|FOLDER", help="A second one, on the same rows.")
    ] = None,
    min_accuracy: Annotated[float | None, typer.Option(help="Fail below this share.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with plots here.")] = None,
    as_json: Json = False,
) -> None:
    """Measure a router on labelled rows; exit with 1 if it is less accurate than demanded."""
    if min_accuracy is not None and not 0 <= min_accuracy <= 1:
        raise BadRequest(f"--min-accuracy is a share from 0 to 1; got {min_accuracy}.")
    from loramix.route.page import page
    from loramix.route.report import difference, judge, report

    rows = read_labelled(data)
    base = partial(open_base, where, machine)
    first = open_router(router, where.shelf, base)
    second = open_router(compare, where.shelf, base) if compare else None
    known = {*where.shelf.names(), *first.adapters, *(second.adapters if second else ())}
    with notice(f"Routing {len(rows)} rows ..."):
        verdicts = judge(first, rows, known)
        others = judge(second, rows, known) if second else None
    found = report(verdicts)
    gain = difference(others, verdicts) if others else None
    if html:
        html.write_text(page(found, f"Router on {data.name}"), encoding="utf-8")
    if as_json:
        print_json(_fields(found, report(others) if others else None, gain))
    else:
        _print(found)
        if others and gain:
            _print_comparison(str(compare), report(others), gain)
    if min_accuracy is not None and found.accuracy.value < min_accuracy:
        typer.echo(f"Accuracy is {found.accuracy.value:.3f}, less than {min_accuracy:g}.", err=True)
        raise typer.Exit(1)


route.command()(flags(fit))
route.command()(flags(calibrate))


@route.command("suggest")
@flags
def suggest_(
    where: Where,
    router: Annotated[
        Path | None, typer.Option(help="Folder of a router; default: the library's.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say which adapters need examples, which overlap, and which labels look wrong."""
    from loramix.route.gate import GateRouter
    from loramix.route.suggest import suggest

    folder = router or where.shelf.folder / ROUTER
    with notice("Refitting the router five times ..."):
        found = suggest(GateRouter.load(folder))
    if as_json:
        print_json(_plain(found))
        return
    for name, count in found.short.items():
        typer.echo(f"{name} has {count} examples; give it 20 or more.")
    for first, second, share in found.overlaps:
        typer.echo(f"{first} and {second} are taken for each other: {share:.0%} of the examples.")
    for text, label, instead, chance in found.suspects:
        typer.echo(f"{_short(text)} is labelled {label}, looks like {instead} ({chance:.0%}).")
    if not any(found):
        typer.echo("Nothing to suggest.")


@route.command()
@flags
def feedback(
    where: Where,
    trace: Annotated[
        str | None, typer.Argument(help="Trace id of an answer of a server; without: list.")
    ] = None,
    right: Annotated[
        str | None, typer.Option(help="The adapter it belongs to, or none for the base.")
    ] = None,
    query: Annotated[
        str | None, typer.Option(metavar="TEXT", help="The query itself, instead of a trace id.")
    ] = None,
    undo: Annotated[str | None, typer.Option(help="Take back the correction of this id.")] = None,
    server: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help=f"A server's, by an admin's $LORAMIX_API_KEY; with a trace id: {SERVER}.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Correct the router: at once for queries like this one, and for the gate at a refit."""
    about = [each for each in (trace, query, undo) if each is not None]
    if len(about) > 1 or (right is None) == bool(trace or query):
        raise BadRequest(
            "Expected a trace id or --query TEXT with --right, or --undo ID, or nothing."
        )
    if trace is not None or server is not None:
        found = _over_http(server or SERVER, trace, query, right, undo)
    else:
        found = _in_library(where, query, right, undo)
    if as_json:
        print_json({"corrections": found})
        return
    for each in found:
        typer.echo(f"{each['id']}  {each['right'] or 'none'}  {_short(each['text'])}")


def _in_library(
    where: Where, query: str | None, right: str | None, undo: str | None
) -> list[dict[str, Any]]:
    """Correct the library's router, list its corrections, or take one back."""
    router = load_router(where.shelf)
    if query is not None:
        return [_plain(router.correct(query, _adapter(right)))]
    if undo is not None:
        return [_plain(router.log.undo(undo))]
    return [_plain(each) for each in router.log.corrections()]


def _over_http(
    server: str, trace: str | None, query: str | None, right: str | None, undo: str | None
) -> list[dict[str, Any]]:
    """The same of a server's router; it keeps the texts of the last traces."""
    if undo is not None:
        return [ask_server(server, "DELETE", f"/v1/feedback/{quote(undo, safe='')}")]
    if trace is None and query is None:
        return list(ask_server(server, "GET", "/v1/feedback")["data"])
    about = {"text": query} if trace is None else {"trace_id": trace}
    return [ask_server(server, "POST", "/v1/feedback", {**about, "right": _adapter(right)})]


def _adapter(right: str | None) -> str | None:
    return None if right == "none" else right


@route.command("refit")
@flags
def refit_(where: Where, as_json: Json = False) -> None:
    """Learn all adapters together anew, and the corrections if that costs nothing."""
    from loramix.route.refit import refit_in

    load_router(where.shelf).log.check()
    with notice("Learning all adapters together ..."):
        found = refit_in(where.shelf.folder / ROUTER)
    if as_json:
        print_json({**_plain(found), "router": None, "learned": found.router is not None})
        return
    verdict = f"joined {len(found.joined)}" if found.router else "kept the gate as it was"
    judged = (
        ""
        if math.isnan(found.before)
        else f"held-out score {found.before:.3f} -> {found.after:.3f}: "
    )
    typer.echo(f"{judged}{verdict}")


def _short(text: str) -> str:
    flat = " ".join(text.split())
    return repr(flat if len(flat) <= 80 else flat[:77] + "...")


def _print(found: Report) -> None:
    _print_figures(found)
    for truth, choice, queries in found.confused:
        typer.echo(f"\n{truth} taken for {choice}:")
        for query in queries:
            typer.echo(f"  {' '.join(query.split())[:100]}")


def _print_figures(found: Report) -> None:
    from loramix.route.page import FIGURES

    for name, meaning in FIGURES.items():
        if (figure := getattr(found, name)).n:
            typer.echo(f"{_shares(figure)}  {meaning}")
    plain = [
        (found.none_auroc, "area under the curve of P(none)"),
        (found.calibration_error, "expected calibration error"),
    ]
    for value, meaning in plain:
        if not math.isnan(value):
            typer.echo(f"{value:6.3f}                        {meaning}")
    typer.echo(f"{found.p50_ms:6.1f} ms, p95 {found.p95_ms:.1f} ms         one query")


def _print_comparison(name: str, other: Report, gain: Figure) -> None:
    typer.echo(f"\n{name} on the same rows:")
    _print_figures(other)
    span = f"[{gain.low:+.3f}, {gain.high:+.3f}]"
    typer.echo(f"{gain.value:+6.3f} {span} gain in accuracy over it, row by row")


def _shares(figure: Figure) -> str:
    interval = f"[{figure.low:.3f}, {figure.high:.3f}]"
    return f"{figure.value:6.3f} {interval} n={figure.n:<5}"


def _fields(found: Report, other: Report | None, gain: Figure | None) -> dict[str, Any]:
    compared = {"compare": _plain(other), "gain": _plain(gain)} if other else {}
    return {**_plain(found), **compared}


def _plain(value: Any) -> Any:
    """Named fields all the way down; null for what no row has a say in."""
    if is_dataclass(value):
        return {each.name: _plain(getattr(value, each.name)) for each in fields(value)}
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value
