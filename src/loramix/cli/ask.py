"""`loramix ask` and `loramix route`: one answer, many answers, or only the mix."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from loramix.cli.flags import Json, Machine, Mixed, Picking, Where
from loramix.cli.opening import open_lm
from loramix.cli.printing import decision_fields, print_json, reply_fields
from loramix.cli.reading import read_lines, read_stdin
from loramix.errors import BadRequest
from loramix.lm import Stream, as_messages, check_mix, load_router

Text = Annotated[str | None, typer.Argument(help="What to ask; - reads it from stdin.")]
Lines = Annotated[Path | None, typer.Option("--file", help="Ask every line of a file at once.")]


def ask(
    where: Where,
    machine: Machine,
    picking: Picking,
    text: Text = None,
    file: Lines = None,
    mix: Mixed = "auto",
    as_json: Json = False,
) -> None:
    """Answer a text, or every line of a file in one running batch."""
    texts = _texts(text, file)
    sampling = picking.sampling
    check_mix(mix, where.shelf)
    with open_lm(where, machine) as lm:
        if file is None and not as_json:
            _print_stream(lm.stream(texts[0], mix, sampling=sampling))
            return
        for reply in lm.ask_all(texts, mix, sampling=sampling):
            if as_json:
                print_json(reply_fields(reply))
            else:
                typer.echo(reply.text)


def route(where: Where, text: Text = None, as_json: Json = False) -> None:
    """Say which mix would answer a text, and why."""
    messages = as_messages(_texts(text, None)[0])
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


def _texts(text: str | None, file: Path | None) -> list[str]:
    """What to ask, checked before a model is opened."""
    if (text is None) == (file is None):
        raise BadRequest("Expected one text, - for stdin, or --file; give exactly one of them.")
    texts = read_lines(file) if file else [read_stdin() if text == "-" else str(text)]
    for each in texts:
        as_messages(each)
    return texts


def _print_stream(stream: Stream) -> None:
    for chunk in stream:
        typer.echo(chunk.text, nl=False)
        sys.stdout.flush()
    typer.echo()
    if sys.stderr.isatty():
        typer.secho(f"[{stream.mix}]", err=True, dim=True)
