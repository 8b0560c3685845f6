"""What commands are given as files or on stdin, or the sentence that says why it cannot be used."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from loramix.errors import BadRequest


def read_stdin() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise BadRequest("The text on stdin is not UTF-8; convert it first.") from error


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file, blank ones left out; BadRequest if none is left."""
    try:
        lines = [line.strip() for line in path.read_text("utf-8").split("\n")]
    except UnicodeDecodeError as error:
        raise BadRequest(f"{path} is not UTF-8 text; expected one item a line.") from error
    if not any(lines):
        raise BadRequest(f"{path} is empty; expected one item a line.")
    return [line for line in lines if line]


def read_queries(path: Path) -> list[str]:
    """Queries of one adapter: lines of text, or of JSON with a "query" where it is a .jsonl."""
    if path.suffix != ".jsonl":
        return read_lines(path)
    return [row["query"] for row in _rows(path, ("query",))]


def read_examples(path: Path) -> Mapping[str, Sequence[str]]:
    """Queries by adapter, from lines like {"adapter": "sql", "query": "..."}."""
    examples: dict[str, list[str]] = defaultdict(list)
    for row in _rows(path, ("adapter", "query")):
        examples[row["adapter"]].append(row["query"])
    return examples


def _rows(path: Path, keys: tuple[str, ...]) -> list[dict[str, str]]:
    return [_row(line, keys, f"Item {n} of {path}") for n, line in enumerate(read_lines(path), 1)]


def _row(line: str, keys: tuple[str, ...], where: str) -> dict[str, str]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise BadRequest(
            f"{where} is not JSON ({error.msg}); expected one object a line."
        ) from error
    if not isinstance(row, dict) or any(not isinstance(row.get(key), str) for key in keys):
        raise BadRequest(f"{where} lacks text; expected an object with {' and '.join(keys)}.")
    return row
