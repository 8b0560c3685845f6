"""Answers to texts and tokens, in the shape of OpenAI's completions."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel

from loramix.engine import Chunk, Engine, LogProb
from loramix.serve.answering import Numbered
from loramix.serve.events import DONE, event
from loramix.serve.shapes import Chosen, Head, UsageBody, usage


class TextLogprobs(BaseModel):
    """Nothing comes before an echoed prompt's first token, so it has none."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(BaseModel):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"]
    mix: str


class TextCompletion(BaseModel):
    """Each choice says its mix, as several prompts may be routed to several."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: UsageBody
    loramix: Chosen


@dataclass(frozen=True, slots=True)
class Manner:
    """How the answers are to be shown."""

    echoes: tuple[str, ...]  # what each prompt's answers begin with; empty without echo
    n: int
    with_logprobs: bool
    hides_answer: bool  # echo alone was asked for: max_tokens 0


@dataclass(slots=True)
class Choice:
    """One answer as it grows."""

    index: int
    mix: str
    manner: Manner
    texts: list[str] = field(default_factory=list)
    logprobs: list[LogProb] = field(default_factory=list)
    finish: str | None = None
    num_tokens: int = 0
    offset: int = 0  # characters of the tokens whose log-probabilities were told

    def take(self, chunk: Chunk) -> str:
        """The text that this chunk adds."""
        text = "" if self.manner.hides_answer else chunk.text
        if not self.texts and self.manner.echoes:
            text = self.manner.echoes[self.index // self.manner.n] + text
            self.logprobs += chunk.prompt_logprobs
        if not self.manner.hides_answer:
            self.logprobs += chunk.logprobs
            self.num_tokens += chunk.num_tokens
        if chunk.finish:
            self.finish = "length" if self.manner.hides_answer else chunk.finish
        self.texts.append(text)
        return text

    def told(self, engine: Engine) -> dict[str, Any] | None:
        """The log-probabilities that were not told yet."""
        if not self.manner.with_logprobs:
            return None
        told, self.logprobs = self.logprobs, []
        tokens = [engine.text([own.token]) for own in told]
        offsets = []
        for token in tokens:
            offsets.append(self.offset)
            self.offset += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [None if math.isnan(own.value) else own.value for own in told],
            "top_logprobs": [_top(own, engine) for own in told],
            "text_offset": offsets,
        }


async def whole(
    head: Head, chunks: AsyncGenerator[Numbered], engine: Engine, manner: Manner
) -> dict[str, Any]:
    """The response to a request that is not streamed."""
    choices = _choices(head, manner)
    sizes = [0] * len(head.plans)
    async with aclosing(chunks):
        async for number, chunk in chunks:
            choices[number * manner.n + chunk.index].take(chunk)
            sizes[number] = sizes[number] or chunk.num_prompt_tokens
    return {
        **head.fields(),
        "choices": [
            {
                "index": choice.index,
                "text": "".join(choice.texts),
                "logprobs": choice.told(engine),
                "finish_reason": choice.finish,
                "mix": choice.mix,
            }
            for choice in choices
        ],
        "usage": usage(sum(sizes), sum(choice.num_tokens for choice in choices)),
        "loramix": head.chosen(),
    }


async def events(
    head: Head,
    chunks: AsyncGenerator[Numbered],
    engine: Engine,
    manner: Manner,
    *,
    with_usage: bool,
) -> AsyncGenerator[bytes]:
    """The response as events, one for each piece of text."""
    choices = _choices(head, manner)
    fields = head.fields()
    sizes = [0] * len(head.plans)
    more: dict[str, Any] = {"loramix": head.chosen()}
    async with aclosing(chunks):
        async for number, chunk in chunks:
            choice = choices[number * manner.n + chunk.index]
            part = {
                "index": choice.index,
                "text": choice.take(chunk),
                "logprobs": choice.told(engine),
                "finish_reason": choice.finish,
                "mix": choice.mix,
            }
            sizes[number] = sizes[number] or chunk.num_prompt_tokens
            yield event({**fields, "choices": [part], **more})
            more = {}
    if with_usage:
        num_tokens = sum(choice.num_tokens for choice in choices)
        yield event({**fields, "choices": [], "usage": usage(sum(sizes), num_tokens)})
    yield DONE


def _choices(head: Head, manner: Manner) -> Sequence[Choice]:
    mixes = [str(plan.request.mix) for plan in head.plans for _ in range(manner.n)]
    return [Choice(index, mix, manner) for index, mix in enumerate(mixes)]


def _top(own: LogProb, engine: Engine) -> dict[str, float] | None:
    """The likeliest tokens and the one itself; of two that read alike the likelier counts."""
    if math.isnan(own.value):
        return None
    found: dict[str, float] = {}
    for token, value in (*own.top, (own.token, own.value)):
        found.setdefault(engine.text([token]), value)
    return found
