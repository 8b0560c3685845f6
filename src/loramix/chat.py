"""Messages and examples, and the only place that turns them into a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from loramix.errors import BadRequest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True)
class Message:
    role: Role
    content: str


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


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """The tokens of a conversation up to where the model's answer begins.

    Uses the tokenizer's own chat template; a tokenizer without one (GPT-2 and other base models)
    gets the contents joined by blank lines, as plain text to continue.
    """
    if not messages:
        raise BadRequest("A conversation needs at least one message; got none.")
    if not tokenizer.chat_template:
        return list(tokenizer("\n\n".join(m.content for m in messages))["input_ids"])
    from jinja2 import TemplateError

    turns = [{"role": m.role, "content": m.content} for m in messages]
    try:
        rendered: Any = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_dict=True
        )
    except TemplateError as error:  # how a template refuses a system turn or an order of turns
        raise BadRequest(
            f"The base's chat template refuses these messages ({error}); reorder or drop some."
        ) from error
    return list(rendered["input_ids"])
