"""What commands are given as files or on stdin, or the sentence that says why it cannot be used."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loramix.chat import Example, Message
from loramix.errors import BadRequest
from loramix.lm import as_messages

if TYPE_CHECKING:
    from loramix.route.report import Row


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


def read_answered(path: Path) -> list[Example]:
    """Rows with their answers, from lines with "query" and "answer", or with "messages".

    A row may name the "adapter" it belongs to. Raises BadRequest, naming the line.
    """
    return [_example(line, f"Item {n} of {path}") for n, line in enumerate(read_lines(path), 1)]


def _example(line: str, where: str) -> Example:
    row = _object(line, where)
    turns = row.get("messages", [])
    if "messages" not in row:
        turns = [
            {"role": "user", "content": row.get("query")},
            {"role": "assistant", "content": row.get("answer")},
        ]
    try:
        messages = tuple(Message(**turn) for turn in turns)
    except TypeError as error:
        raise BadRequest(f"{where}: {error}; a message has a role and a content.") from error
    asked = any(m.role == "user" for m in messages) and messages[-1].role == "assistant"
    if not asked or any(not isinstance(m.content, str) or not m.content for m in messages):
        raise BadRequest(
            f"{where} is no question with an answer; expected text as query and answer, or "
            f"messages that end with the assistant's."
        )
    return Example(messages, str(row.get("adapter", "")))


def read_labelled(path: Path) -> list[Row]:
    """Rows like {"text": "...", "route": "sql"}, to evaluate a router on.

    "routes": ["sql", "poem"] asks for several adapters, and null, or no route, for the base.
    "messages" instead of "text" is a conversation that ends with the user's turn.
    """
    return [_labelled(line, f"Item {n} of {path}") for n, line in enumerate(read_lines(path), 1)]


def _labelled(line: str, where: str) -> Row:
    from loramix.route.report import Row

    row = _object(line, where)
    if strange := sorted(row.keys() - {"text", "messages", "route", "routes"}):
        raise BadRequest(f"{where} has an unknown field {strange[0]!r}; take it out.")
    if ("text" in row) == ("messages" in row) or {"route", "routes"} <= row.keys():
        raise BadRequest(f"{where} needs a text or messages, and a route or routes at most.")
    routes = row["routes"] if "routes" in row else [row["route"]] if row.get("route") else []
    if not isinstance(routes, list) or not all(isinstance(each, str) for each in routes):
        raise BadRequest(f"{where} has routes that are not names; expected text, a list or null.")
    messages = _messages(row["messages"], where) if "messages" in row else row["text"]
    if not isinstance(messages, str | list):
        raise BadRequest(f"{where} has a text that is none; expected a string.")
    return Row(as_messages(messages), frozenset(routes))


def _messages(turns: object, where: str) -> list[Message]:
    sound = isinstance(turns, list) and all(
        isinstance(turn, dict)
        and turn.get("role") in ("system", "user", "assistant")
        and isinstance(turn.get("content"), str)
        for turn in turns
    )
    if not sound:
        raise BadRequest(f"{where} has messages that are not a list of role and content.")
    assert isinstance(turns, list)
    return [Message(turn["role"], turn["content"]) for turn in turns]


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise BadRequest(
            f"{where} is not JSON ({error.msg}); expected one object a line."
        ) from error
    if not isinstance(row, dict):
        raise BadRequest(f"{where} is not an object; expected one object a line.")
    return row
