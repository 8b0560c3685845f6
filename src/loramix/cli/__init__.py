"""The command line: words in, calls to `loramix.lm` and `loramix.library`, text or JSON out.

Answers go to stdout and everything else to stderr, so that a pipe sees only answers. Every error
is one line on stderr and exit status 1 (2 for an unknown command or option), and nothing is
written then. Torch is loaded by the commands that open a model, not by `--help`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, NoReturn

import typer

from loramix.cli.adapters import adapters
from loramix.cli.ask import ask
from loramix.cli.chat import chat
from loramix.cli.convert import convert
from loramix.cli.data import data
from loramix.cli.demo import demo
from loramix.cli.evaluate import evaluate
from loramix.cli.flags import flags
from loramix.cli.jobs import jobs
from loramix.cli.keys import keys
from loramix.cli.merge import merge
from loramix.cli.publish import card, pull, push
from loramix.cli.route import route
from loramix.cli.search import search
from loramix.cli.serve import logs, run_one, serve, validate
from loramix.cli.train import train
from loramix.errors import LoramixError

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in (ask, chat, train, merge, convert, card, push, pull, demo, search):
    app.command()(flags(command))
app.command("eval")(flags(evaluate))
PLAIN: dict[str, Callable[..., None]] = {
    "serve": serve,
    "up": serve,
    "validate": validate,
    "run": run_one,
    "logs": logs,
}
for name, plain in PLAIN.items():
    app.command(name)(plain)
app.add_typer(adapters, name="adapters")
app.add_typer(route, name="route")
app.add_typer(data, name="data")
app.add_typer(keys, name="keys")
app.add_typer(jobs, name="jobs")


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"loramix {version('loramix')}")
        raise typer.Exit


@app.callback()
def loramix(
    _version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """One frozen base language model, many LoRA adapters, every request its own weighted mix."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; the one place where errors end."""
    words = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        status = app(args=words, standalone_mode=False, prog_name="loramix")
    except typer.TyperException as error:  # an option that is unknown (2) or cannot be read (1)
        known = isinstance(error, typer.BadParameter)
        return _fail(error.format_message(), 1 if known else error.exit_code)
    except LoramixError as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(f"{error.strerror or error}: {error.filename or 'no file named'}.")
    except typer.Abort:
        return 130
    return status if isinstance(status, int) else 0


def run() -> NoReturn:
    """The program: `main`, then leave at once.

    Taking torch's and transformers' million objects apart one by one would take another half
    second of every answer; there is nothing left in them to be saved.
    """
    status = main()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except BrokenPipeError:  # whoever read along has left
        status = 1
    os._exit(status)


def _fail(message: str, status: int = 1) -> int:
    sentence = " ".join(message.split())
    typer.echo(f"Error: {sentence}{'' if sentence.endswith(('.', '?')) else '.'}", err=True)
    return status
