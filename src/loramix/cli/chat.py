"""`loramix chat`: turns that share a history while the mix that answers may change."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import typer

from loramix.cli.flags import Json, Machine, Mixed, Picking, Where
from loramix.cli.opening import open_lm
from loramix.cli.printing import print_json, reply_fields
from loramix.errors import BadRequest, LoramixError
from loramix.lm import Conversation, check_mix

HELP = """\
/mix MIX     answer with a mix, for instance /mix sql or /mix sql:0.5+math:0.5 or /mix base
/auto        let the router choose again
/adapters    list the adapters
/reset       forget the conversation
/save FILE   write the conversation as JSON
/quit        leave (or Ctrl-D)"""


def chat(
    where: Where,
    machine: Machine,
    picking: Picking,
    mix: Mixed = "auto",
    as_json: Json = False,
) -> None:
    """Talk; /help lists the commands. Without a terminal, every line of stdin is a turn."""
    check_mix(mix, where.shelf)
    sampling = picking.sampling
    with open_lm(where, machine) as lm:
        talk(Conversation(lm, mix, sampling), as_json=as_json)


def talk(conversation: Conversation, *, as_json: bool = False) -> None:
    """Answer lines until /quit or the end of input; an error ends a turn, not the talk."""
    if sys.stdin.isatty():
        typer.secho(f"mix: {conversation.mix}   /help lists the commands", err=True, dim=True)
    for line in _lines():
        try:
            if line == "/quit":
                return
            if line.startswith("/"):
                _command(conversation, line)
            else:
                _turn(conversation, line, as_json)
        except KeyboardInterrupt:  # ends the answer; at the prompt it ends the talk
            typer.echo("\n(stopped)", err=True)
        except (LoramixError, OSError) as error:
            typer.echo(f"Error: {error}", err=True)


def _lines() -> Iterator[str]:
    """What the user types, blank lines left out; with line editing where there is a terminal."""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):  # not on Windows
            import readline  # noqa: F401
    with contextlib.suppress(EOFError):
        while True:
            if line := input("> " if sys.stdin.isatty() else "").strip():
                yield line


def _turn(conversation: Conversation, text: str, as_json: bool) -> None:
    chunks = conversation.say(text)
    for chunk in chunks:
        if not as_json:
            typer.echo(chunk.text, nl=False)
            sys.stdout.flush()
    reply = conversation.turns[-1][1]
    if as_json:
        print_json(reply_fields(reply))
        return
    typer.echo()
    typer.secho(f"[{reply.mix}]", err=True, dim=True)


def _command(conversation: Conversation, line: str) -> None:
    name, _, rest = line.partition(" ")
    match name, rest.strip():
        case "/mix", mix if mix:
            check_mix(mix, conversation.lm.library)
            conversation.mix = mix
        case "/auto", "":
            check_mix("auto", conversation.lm.library)
            conversation.mix = "auto"
        case "/adapters", "":
            for card in conversation.lm.library.cards():
                typer.echo(f"{card.name}  {card.description}", err=True)
        case "/reset", "":
            conversation.turns.clear()
        case "/save", file if file:
            _save(conversation, Path(file).expanduser())
        case "/help", "":
            typer.echo(HELP, err=True)
        case _:
            raise BadRequest(f"Cannot do {line[:60]!r}; /help lists the commands.")


def _save(conversation: Conversation, path: Path) -> None:
    """Write the messages, each answer with the mix that gave it; an existing file is kept."""
    if path.exists():
        raise BadRequest(f"{path} exists already; choose another name.")
    messages = []
    for text, reply in conversation.turns:
        messages.append({"role": "user", "content": text})
        messages.append({"role": "assistant", "content": reply.text, "mix": str(reply.mix)})
    aside = path.with_name(path.name + ".part")
    aside.write_text(json.dumps({"messages": messages}, indent=2, ensure_ascii=False), "utf-8")
    os.replace(aside, path)
    typer.echo(f"Saved {len(conversation.turns)} turns to {path}.", err=True)
