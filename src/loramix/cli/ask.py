"""`loramix ask`: one answer, or many."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from loramix.cli.flags import Json, Machine, Mixed, Picking, Where
from loramix.cli.opening import open_lm
from loramix.cli.printing import print_json, reply_fields
from loramix.cli.reading import read_lines, read_stdin
from loramix.errors import BadRequest
from loramix.lm import Stream, as_messages, check_mix

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
