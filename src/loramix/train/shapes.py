"""The shapes that rows come in, and what each of them is as a conversation.

    alpaca      {"instruction", "input", "output", "history", "system"}
    sharegpt    {"conversations": [{"from": "human", "value"}, ...], "tools"}
    openai      {"messages": [{"role": "user", "content"}, ...], "tools"}
    pairs       {"prompt", "completion"} and the like
    text        {"text"}

Columns and tags are renamed as in LLaMA-Factory's dataset_info.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loramix.chat import Call, Example, Message
from loramix.errors import TrainError

PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("query", "answer"),
    ("question", "answer"),
    ("input", "output"),
)
MEDIA = ("images", "videos", "audios")
COLUMNS: dict[str, dict[str, str]] = {
    "alpaca": {"prompt": "instruction", "query": "input", "response": "output"},
    "sharegpt": {"messages": "conversations"},
    "openai": {"messages": "messages", "tools": "tools"},
    "text": {"prompt": "text"},
}
TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}
OPENAI_TAGS = {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
    "system_tag": "system",
}


class Unfit(Exception):
    """A row that is no conversation, and why; becomes a Problem with its line."""


@dataclass(frozen=True, slots=True)
class Shape:
    """How to read a row: its kind, and what its columns and tags are called."""

    kind: str  # alpaca, sharegpt, openai or text
    columns: Mapping[str, str]
    tags: Mapping[str, str] = field(default_factory=dict)

    def conversation(self, row: Any) -> tuple[Example, list[Any]]:
        """The example of a row, and the tools it may call. Raises Unfit."""
        if not isinstance(row, dict):
            raise Unfit(f"a {type(row).__name__}; expected an object with columns")
        if self.kind == "text":
            return Example((Message("assistant", self._text(row, "prompt")),)), []
        turns = self._pair(row) if self.kind == "alpaca" else self._turns(row)
        if system := self._text(row, "system", needed=False):
            turns = [Message("system", system), *turns]
        _check_order(turns)
        return Example(tuple(turns)), self._tools(row)

    def _pair(self, row: dict[str, Any]) -> list[Message]:
        asked = [self._text(row, "prompt"), self._text(row, "query", needed=False)]
        answer = self._text(row, "response")
        turns = []
        for old in self._list(row, "history"):
            if not isinstance(old, Sequence) or len(old) != 2 or not all(map(_is_text, old)):
                raise Unfit("a history that is not a list of pairs of texts")
            turns += [Message("user", old[0]), Message("assistant", old[1])]
        question = "\n".join(text for text in asked if text)
        if not question.strip():
            raise Unfit(f"{self.columns['prompt']!r} is empty; expected a question")
        if not answer.strip():
            raise Unfit(f"{self.columns['response']!r} is empty; there is nothing to learn")
        return [*turns, Message("user", question), Message("assistant", answer)]

    def _turns(self, row: dict[str, Any]) -> list[Message]:
        name = self.columns["messages"]
        if name not in row:
            raise Unfit(f"no column {name!r}; it has {_listed(row)}")
        found = row[name]
        if not isinstance(found, list) or not found:
            raise Unfit(f"{name!r} is no list of turns, or an empty one")
        return [self._turn(n, turn) for n, turn in enumerate(found, 1)]

    def _turn(self, n: int, turn: Any) -> Message:
        role_tag, content_tag = self.tags["role_tag"], self.tags["content_tag"]
        if not isinstance(turn, dict) or role_tag not in turn:
            raise Unfit(f"turn {n} has no {role_tag!r}")
        role = turn[role_tag]
        calls = _calls(n, turn.get("tool_calls") or ())
        text = _plain(n, turn.get(content_tag, "" if calls else None), content_tag)
        known = {self.tags[tag]: tag for tag in self.tags if tag not in ("role_tag", "content_tag")}
        match known.get(role):
            case "user_tag":
                return Message("user", text)
            case "assistant_tag":
                if not text.strip() and not calls:
                    raise Unfit(f"turn {n}, an answer, is empty; there is nothing to learn")
                return Message("assistant", text, calls)
            case "observation_tag":
                return Message("tool", text, call_id=str(turn.get("tool_call_id", "")))
            case "function_tag":
                return Message("assistant", "", _written_calls(n, text))
            case "system_tag":
                return Message("system", text)
        raise Unfit(f"turn {n} is of {role!r}; expected {', '.join(known)}")

    def _tools(self, row: dict[str, Any]) -> list[Any]:
        found = row.get(self.columns.get("tools", "")) or []
        if isinstance(found, str):
            try:
                found = json.loads(found) if found.strip() else []
            except json.JSONDecodeError as error:
                raise Unfit(f"'tools' is not JSON ({error.msg})") from error
        if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
            raise Unfit("'tools' is no list of objects")
        return [t if "function" in t else {"type": "function", "function": t} for t in found]

    def _text(self, row: dict[str, Any], member: str, *, needed: bool = True) -> str:
        name = self.columns.get(member)
        if name is None or (not needed and row.get(name) is None):
            return ""
        if name not in row:
            raise Unfit(f"no column {name!r}; it has {_listed(row)}")
        if not isinstance(row[name], str):
            raise Unfit(f"{name!r} is a {type(row[name]).__name__}; expected text")
        if member in ("prompt", "response") and self.kind == "text" and not row[name].strip():
            raise Unfit(f"{name!r} is empty; there is nothing to learn")
        return str(row[name])

    def _list(self, row: dict[str, Any], member: str) -> list[Any]:
        found = row.get(self.columns.get(member, "")) or []
        if not isinstance(found, list):
            raise Unfit(f"{member!r} is a {type(found).__name__}; expected a list")
        return found


def detect(row: Any) -> Shape:
    """The shape of rows like this one, by the names of their columns; TrainError if none fits."""
    keys = set(row) if isinstance(row, dict) else set()
    for name in ("messages", "conversations"):
        if name in keys:
            turns: Any = row[name]
            openai = isinstance(turns, list) and any(
                isinstance(t, dict) and "role" in t for t in turns
            )
            columns = {"messages": name, "tools": "tools", "system": "system"}
            return Shape(
                "openai" if openai else "sharegpt", columns, OPENAI_TAGS if openai else TAGS
            )
    if {"instruction", "output"} <= keys:
        return Shape("alpaca", COLUMNS["alpaca"] | {"history": "history", "system": "system"})
    for prompt, response in PAIRS:
        if {prompt, response} <= keys:
            return Shape("alpaca", {"prompt": prompt, "response": response, "system": "system"})
    if "text" in keys:
        return Shape("text", COLUMNS["text"])
    raise TrainError(
        f"The columns {_listed(row) if keys else 'of the first row'} are of no known shape; "
        f"expected alpaca (instruction, output), sharegpt (conversations), messages, prompt and "
        f"completion, or text; rename them, or name them in dataset_info.json."
    )


def declared(entry: Mapping[str, Any], name: str, notes: list[str]) -> Shape:
    """The shape that an entry of dataset_info.json declares.

    As in LLaMA-Factory a column that is not named is not read once any is named; of a system
    prompt, tools or a history that go unread that way `notes` tell. TrainError for what is not
    fine-tuning on text.
    """
    columns = dict(entry.get("columns") or {})
    for wrong in (*MEDIA, "chosen", "rejected", "kto_tag"):
        if wrong in columns or (wrong == "chosen" and entry.get("ranking")):
            raise TrainError(
                f"The dataset {name!r} has a column for {wrong}; expected conversations of text "
                f"with answers to learn (images and preferences are not supported)."
            )
    kind = entry.get("formatting", "alpaca")
    if kind not in ("alpaca", "sharegpt", "openai"):
        raise TrainError(
            f"The dataset {name!r} has formatting {kind!r}; expected alpaca, sharegpt or openai."
        )
    if kind == "alpaca" and set(columns) == {"prompt"}:
        return Shape("text", columns)
    if not columns:
        columns = COLUMNS[kind] | ({"history": "history"} if kind == "alpaca" else {})
    if kind == "alpaca" and not {"prompt", "response"} <= set(columns):
        raise TrainError(f"The dataset {name!r} names no column for prompt and response.")
    tags = dict(entry.get("tags") or {}) or (OPENAI_TAGS if kind == "openai" else TAGS)
    if kind != "alpaca" and entry.get("tags"):
        tags = {"role_tag": "from", "content_tag": "value"} | tags
        if missing := {"observation_tag", "function_tag"} - set(tags):
            notes.append(f"{name}: turns of {', '.join(sorted(missing))} are not read (unnamed).")
    columns.setdefault("messages", "conversations")
    return Shape(kind, columns, tags)


def _check_order(turns: Sequence[Message]) -> None:
    """A system turn, then user and assistant in turn, tools after calls, an answer at the end."""
    before = ""
    for n, turn in enumerate(turns, 1):
        expected = {
            "": ("system", "user"),
            "system": ("user",),
            "user": ("assistant",),
            "assistant": ("user",),
            "calls": ("tool",),
            "tool": ("tool", "assistant"),
        }[before]
        if turn.role not in expected:
            raise Unfit(f"turn {n} is of the {turn.role}; expected {' or '.join(expected)}")
        before = "calls" if turn.calls else turn.role
    if before not in ("assistant", "calls"):
        raise Unfit(f"the last turn is of the {turns[-1].role}; expected an answer")


def _plain(n: int, content: Any, name: str) -> str:
    """Text, or the texts of a list of parts."""
    if isinstance(content, str):
        return content
    if content is None:
        raise Unfit(f"turn {n} has no {name!r}")
    if not isinstance(content, list):
        raise Unfit(f"{name!r} of turn {n} is a {type(content).__name__}; expected text")
    texts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise Unfit(f"turn {n} has a part of type {kind!r}; expected text")
        texts.append(str(part.get("text", part.get("value", ""))))
    return "".join(texts)


def _calls(n: int, found: Any) -> tuple[Call, ...]:
    calls = []
    for call in found:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Unfit(f"a tool call of turn {n} names no function")
        calls.append(Call(function["name"], _arguments(n, function), str(call.get("id", ""))))
    return tuple(calls)


def _written_calls(n: int, text: str) -> tuple[Call, ...]:
    """The calls of a turn that writes them as JSON, one or a list."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise Unfit(f"turn {n}, a function call, is not JSON ({error.msg})") from error
    calls = found if isinstance(found, list) else [found]
    if not calls or not all(isinstance(c, dict) and _is_text(c.get("name")) for c in calls):
        raise Unfit(f"turn {n}, a function call, has no name")
    return tuple(Call(c["name"], _arguments(n, c)) for c in calls)


def _arguments(n: int, function: Mapping[str, Any]) -> str:
    found = function.get("arguments", {})
    try:
        value = json.loads(found) if isinstance(found, str) else found
    except json.JSONDecodeError as error:
        raise Unfit(f"the arguments of a call in turn {n} are not JSON ({error.msg})") from error
    if not isinstance(value, dict):
        raise Unfit(f"the arguments of a call in turn {n} are no object")
    return json.dumps(value, ensure_ascii=False)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _listed(row: Any) -> str:
    names = [repr(str(key)) for key in list(row)[:8]]
    return ", ".join(names) or "none"
