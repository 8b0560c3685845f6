"""Messages and examples, and the only place that turns them into a prompt."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from loramix.errors import BadRequest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True)
class Call:
    """A tool that the model wants called; `arguments` is a JSON object, as text."""

    name: str
    arguments: str
    id: str = ""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn; that of role "tool" is what a tool returned to the call `call_id`."""

    role: Role
    content: str
    calls: tuple[Call, ...] = ()  # of an assistant's turn
    call_id: str = ""


@dataclass(frozen=True, slots=True)
class Example:
    """One conversation with its answer: a row of training, routing or benchmark data."""

    messages: tuple[Message, ...]  # the last one is the answer
    adapter: str = ""  # the adapter it belongs to, if known

    @classmethod
    def of(cls, query: str, answer: str, adapter: str = "") -> Example:
        return cls((Message("user", query), Message("assistant", answer)), adapter)

    @property
    def query(self) -> str:
        """The last user turn: what a router looks at."""
        return next(m.content for m in reversed(self.messages) if m.role == "user")

    @property
    def answer(self) -> str:
        return self.messages[-1].content


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    template: Mapping[str, Any] | None = None,
) -> list[int]:
    """The tokens of a conversation up to where the model's answer begins.

    Uses the tokenizer's own chat template; a tokenizer without one (GPT-2 and other base models)
    gets the contents joined by blank lines, as plain text to continue. `template` is what else the
    template is told, for instance `tools` or `enable_thinking`. BadRequest for what it does not
    mention, as that would change nothing, and for turns that it refuses.
    """
    if not messages:
        raise BadRequest("A conversation needs at least one message; got none.")
    told = dict(template or {})
    _require_mentioned(tokenizer, messages, told)
    if not tokenizer.chat_template:
        return list(tokenizer("\n\n".join(m.content for m in messages))["input_ids"])
    return _rendered(tokenizer, messages, {**told, "add_generation_prompt": True})


def answered_ids(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    template: Mapping[str, Any] | None = None,
) -> list[int]:
    """The tokens of a conversation whose last message is the model's answer, its end included.

    As `prompt_ids` otherwise.
    """
    told = dict(template or {})
    _require_mentioned(tokenizer, messages, told)
    if not tokenizer.chat_template:
        answer = tokenizer(messages[-1].content, add_special_tokens=False)["input_ids"]
        prompt = prompt_ids(tokenizer, messages[:-1]) if messages[:-1] else []
        return [*prompt, *answer, tokenizer.eos_token_id]
    return _rendered(tokenizer, messages, told)


def _rendered(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], told: Mapping[str, Any]
) -> list[int]:
    from jinja2 import TemplateError

    turns = [_turn(message) for message in messages]
    try:
        rendered: Any = tokenizer.apply_chat_template(turns, return_dict=True, **told)
    except (TemplateError, TypeError) as error:  # how a template refuses a turn or their order
        raise BadRequest(
            f"The base's chat template refuses these messages ({error}); reorder or drop some."
        ) from error
    return list(rendered["input_ids"])


def template_text(tokenizer: PreTrainedTokenizerBase, *, with_tools: bool = False) -> str:
    """The chat template; of several the one for tools or the plain one. Empty if there is none."""
    if not tokenizer.chat_template:
        return ""
    return str(tokenizer.get_chat_template(tools=[{}] if with_tools else None))


def _turn(message: Message) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.calls:
        turn["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": json.loads(call.arguments)},
            }
            for call in message.calls
        ]
    if message.role == "tool":
        turn["tool_call_id"] = message.call_id
    return turn


def _require_mentioned(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], told: Mapping[str, Any]
) -> None:
    """BadRequest if the template would pass over something that it is told."""
    with_tools = "tools" in told or any(m.calls or m.role == "tool" for m in messages)
    text = template_text(tokenizer, with_tools=with_tools)
    wanted = {*told, "tools"} if with_tools else set(told)
    for name in sorted(wanted):
        if not re.search(rf"\b{re.escape(name)}\b", text):
            raise BadRequest(
                f"The chat template of this base knows nothing of {name!r}; leave that out, or "
                f"serve a base that does."
            )
