"""`loramix demo`: a server on pocket is asked real held-out queries, then there to chat with."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import typer

from loramix.cli.flags import Machine
from loramix.cli.printing import print_table
from loramix.cli.serve import listening, made_for, opened_service, over_http
from loramix.errors import BaseError, LoramixError, ServeError
from loramix.folders import POCKET, own_database

if TYPE_CHECKING:
    from loramix.serve.app import Server
    from loramix.serve.settings import Settings

HOST, PORT = "127.0.0.1", 8000
GREEDY = {"model": "auto", "temperature": 0, "max_tokens": 320}


@dataclass(frozen=True, slots=True)
class Row:
    """One held-out row: the task it belongs to, "none" without a reference if to none of them."""

    task: str
    query: str
    reference: str


def demo(machine: Machine) -> None:
    """Serve pocket, ask it a dozen held-out queries over HTTP, and stay up with the chat page.

    Without a terminal it ends after the answers.
    """
    rows = read_rows(POCKET / "queries.jsonl")
    stays = sys.stdin.isatty() and sys.stdout.isatty()
    with _door() as door, closing(opened_service(_settings(machine))) as service:
        made, url = made_for(door, service, page=stays)
        with ThreadPoolExecutor(1) as beside:
            shown = beside.submit(_show, made, url, rows, stays=stays)
            made.run(sockets=[door])
        shown.result()


def _show(made: Server, url: str, rows: Sequence[Row], *, stays: bool) -> None:
    """Ask all queries at once, as so many clients, and print what comes."""
    start = perf_counter()
    try:
        with ThreadPoolExecutor(len(rows)) as clients:
            answers = list(clients.map(lambda row: _asked(url, row.query), rows))
    except LoramixError:
        if made.should_exit:  # it was told to end meanwhile
            return
        made.should_exit = True
        raise
    _print(rows, answers, perf_counter() - start)
    if stays:
        typer.echo(f"Chat at {url} (Ctrl-C ends it).")
    else:
        made.should_exit = True


def _asked(url: str, query: str) -> dict[str, Any]:
    return over_http(url, {"messages": [{"role": "user", "content": query}], **GREEDY})


def _settings(machine: Machine) -> Settings:
    """Of a database of its own, so that no key is needed."""
    from loramix.serve.settings import load

    base = {"model": "pocket", "dtype": machine.dtype, "device": machine.device}
    base |= {"quantize": machine.quantize} | (
        {"revision": machine.revision} if machine.revision else {}
    )
    said = [f"base.{name}={json.dumps(value)}" for name, value in base.items()]
    return load((), [*said, f"database={json.dumps(own_database('demo.db'))}"])


def _door() -> socket.socket:
    """The usual port, or any that is free."""
    try:
        return listening(HOST, PORT)
    except ServeError:
        return listening(HOST, 0)


def read_rows(path: Path) -> list[Row]:
    """The bundled queries; BaseError if the package was built without them."""
    if not path.is_file():
        raise BaseError(f"{path} is missing; build pocket with recipes/pocket, or reinstall.")
    return [Row(**json.loads(line)) for line in path.read_text("utf-8").rstrip("\n").split("\n")]


def _print(rows: Sequence[Row], answers: Sequence[dict[str, Any]], seconds: float) -> None:
    texts = [answer["choices"][0]["message"]["content"] for answer in answers]
    print_table(
        ("query", "mix", "answer", "reference"),
        [
            (_clipped(row.query, 48), answer["model"], _clipped(text), _clipped(row.reference))
            for row, answer, text in zip(rows, answers, texts, strict=True)
        ],
    )
    tokens = sum(answer["usage"]["completion_tokens"] for answer in answers)
    right = sum(text.strip() == row.reference for row, text in zip(rows, texts, strict=True))
    known = sum(bool(row.reference) for row in rows)
    typer.echo(
        f"{right} of {known} answers equal their reference; "
        f"{tokens} tokens over HTTP in {seconds:.1f} s."
    )


def _clipped(text: str, width: int = 26) -> str:
    """How a text begins: a row of the table is a line, whether the answer is a word or a query."""
    flat = " ".join(text.split())
    return flat if len(flat) <= width else flat[: width - 1].rstrip() + "…"
