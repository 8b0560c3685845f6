"""How replies, decisions and cards look as JSON, and tables on the terminal."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import typer

from loramix.lm import Reply
from loramix.route import Decision


def print_json(value: Mapping[str, Any]) -> None:
    """One object on one line."""
    typer.echo(json.dumps(value, ensure_ascii=False))


def reply_fields(reply: Reply) -> dict[str, Any]:
    return {
        "text": reply.text,
        "mix": str(reply.mix),
        "scores": _rounded(reply.scores, 4),
        "none": None if reply.none is None else round(reply.none, 4),
        "reasons": list(reply.reasons),
        "usage": asdict(reply.usage),
        "ms": _rounded(reply.ms, 1),
    }


def decision_fields(decision: Decision) -> dict[str, Any]:
    return {
        "mix": str(decision.mix),
        "scores": _rounded(decision.scores, 4),
        "none": round(decision.none, 4),
        "coldness": round(decision.coldness, 2),
        "reasons": list(decision.reasons),
        "ms": {"route": round(decision.latency_ms, 1)},
    }


def print_table(titles: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """A table as wide as the terminal; cells are plain text, whatever brackets they hold."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(*titles, box=SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    Console(markup=False, emoji=False, highlight=False).print(table)


def _rounded(values: Mapping[str, float], digits: int) -> dict[str, float]:
    return {name: round(value, digits) for name, value in values.items()}
