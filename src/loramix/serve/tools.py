"""Tools that a model may call: what its template is told of them, and its calls read back.

How a call is written is the model's own habit. Two are read: JSON between `<tool_call>` tags
(Hermes, Qwen) and JSON by itself, maybe after a marker (Llama, Mistral). Where the client asks for
a call, by tool_choice, a schema makes it the second.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from typing import Any

from loramix.chat import Call
from loramix.engine.text import StopStrings
from loramix.errors import BadRequest
from loramix.serve.wire import NamedTool, Tool

TAG = "<tool_call>"
LLAMA = "<|python_tag|>"
_TAGGED = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>\s*|$)", re.DOTALL)
_MARKERS = re.compile(r"^\s*(?:\[TOOL_CALLS\]|<\|python_tag\|>)?\s*")


def required_call(tools: Sequence[Tool], choice: str | NamedTool | None) -> str | None:
    """The JSON schema of an answer that has to be a call; None if it need not be one."""
    if choice is not None and not tools:
        raise BadRequest("tool_choice is said without tools; send tools too.")
    named = choice.function.name if isinstance(choice, NamedTool) else None
    if named is None and choice != "required":
        return None
    wanted = [tool.function for tool in tools if named in (None, tool.function.name)]
    if not wanted:
        raise BadRequest("tool_choice names a function that is not among the tools; add it.")
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": function.name},
                "arguments": function.parameters or {"type": "object"},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for function in wanted
    ]
    return json.dumps(calls[0] if len(calls) == 1 else {"anyOf": calls})


class CallReader:
    """One answer: its text is shown as it comes, unless it may be a call of these tools."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = frozenset(names)
        self._text = ""
        self._num_seen = 0  # characters in which a tag was looked for
        self._num_shown = 0
        self._tag = StopStrings([TAG, LLAMA])

    def push(self, text: str) -> str:
        """The text that can be shown now."""
        self._text += text
        if not self._names:
            return text
        start = self._text.lstrip()
        if not start or start[0] in "{[":
            return ""
        shown = self._tag.push(self._text[self._num_seen :])
        self._num_seen = len(self._text)
        self._num_shown += len(shown)
        return shown

    def flush(self) -> tuple[str, tuple[Call, ...]]:
        """What is left of the text, and the calls, at the end of the answer."""
        if not self._names:
            return "", ()
        text, calls = self._read()
        return text[self._num_shown :], calls

    def _read(self) -> tuple[str, tuple[Call, ...]]:
        tagged = _TAGGED.findall(self._text)
        written = tagged or [_MARKERS.sub("", self._text)]
        calls = [call for text in written for call in self._calls(text)]
        if not calls or (tagged and len(calls) < len(tagged)):
            return self._text, ()
        before = self._text[: self._text.index(TAG)] if tagged else ""
        return before if before.strip() else before[: self._num_shown], tuple(calls)

    def _calls(self, text: str) -> list[Call]:
        """The calls that a text of JSON is; none if it is anything else."""
        try:
            found: Any = json.loads(text)
        except (ValueError, RecursionError):
            return []
        calls = [_call(item) for item in (found if isinstance(found, list) else [found])]
        known = [call for call in calls if call and call.name in self._names]
        return known if len(known) == len(calls) else []


def _call(item: Any) -> Call | None:
    if not isinstance(item, dict) or not isinstance(item.get("name"), str):
        return None
    arguments = item.get("arguments", item.get("parameters", {}))
    if not isinstance(arguments, dict):
        return None
    return Call(item["name"], json.dumps(arguments), f"call_{secrets.token_hex(8)}")
