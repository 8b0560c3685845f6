"""`loramix demo`: real held-out queries through routed mixes, then a chat on a terminal."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import typer

from loramix.cli.chat import talk
from loramix.cli.flags import Machine, Where
from loramix.cli.opening import open_lm
from loramix.cli.printing import print_table
from loramix.engine import Sampling
from loramix.errors import BaseError
from loramix.lm import POCKET, Conversation, Reply

GREEDY = Sampling(temperature=0, max_tokens=320)


@dataclass(frozen=True, slots=True)
class Row:
    """One held-out row: the task it belongs to, "none" without a reference if to none of them."""

    task: str
    query: str
    reference: str


def demo(machine: Machine) -> None:
    """Answer a dozen held-out queries in one running batch, each under the mix it was routed to."""
    rows = read_rows(POCKET / "queries.jsonl")
    with open_lm(Where(), machine) as lm:
        start = perf_counter()
        replies = lm.ask_all([row.query for row in rows], sampling=GREEDY)
        seconds = perf_counter() - start
        _print(rows, replies, seconds)
        if sys.stdin.isatty() and sys.stdout.isatty():
            talk(Conversation(lm))


def read_rows(path: Path) -> list[Row]:
    """The bundled queries; BaseError if the package was built without them."""
    if not path.is_file():
        raise BaseError(f"{path} is missing; build pocket with recipes/pocket, or reinstall.")
    return [Row(**json.loads(line)) for line in path.read_text("utf-8").rstrip("\n").split("\n")]


def _print(rows: list[Row], replies: list[Reply], seconds: float) -> None:
    print_table(
        ("query", "mix", "answer", "reference"),
        [
            (_clipped(row.query, 48), str(reply.mix), _clipped(reply.text), _clipped(row.reference))
            for row, reply in zip(rows, replies, strict=True)
        ],
    )
    tokens = sum(reply.usage.completion_tokens for reply in replies)
    right = sum(r.text.strip() == row.reference for row, r in zip(rows, replies, strict=True))
    known = sum(bool(row.reference) for row in rows)
    typer.echo(
        f"{right} of {known} answers equal their reference; "
        f"{tokens} tokens in one batch in {seconds:.1f} s."
    )


def _clipped(text: str, width: int = 26) -> str:
    """How a text begins: a row of the table is a line, whether the answer is a word or a query."""
    flat = " ".join(text.split())
    return flat if len(flat) <= width else flat[: width - 1].rstrip() + "…"
