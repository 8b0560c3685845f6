"""Answers to conversations, in the shape of OpenAI's chat completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, Literal

from pydantic import BaseModel

from loramix.chat import Call
from loramix.engine import Chunk, Engine, LogProb
from loramix.serve.answering import Numbered
from loramix.serve.events import DONE, event
from loramix.serve.shapes import Chosen, Head, UsageBody, usage
from loramix.serve.tools import CallReader
from loramix.serve.wire import ToolCall


class TokenBody(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TokenBody):
    top_logprobs: list[TokenBody]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None


class AnswerMessage(BaseModel):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(BaseModel):
    """The whole answer; `model` is the mix that gave it, to be sent again for the same."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageBody
    loramix: Chosen


class Choice:
    """One answer as it grows."""

    def __init__(self, index: int, tools: Sequence[str]) -> None:
        self.index = index
        self.texts: list[str] = []
        self.calls: tuple[Call, ...] = ()
        self.logprobs: list[LogProb] = []
        self.finish: str | None = None
        self.num_tokens = 0
        self._reader = CallReader(tools)

    def take(self, chunk: Chunk) -> str:
        """The text that this chunk adds."""
        text = self._reader.push(chunk.text)
        self.num_tokens += chunk.num_tokens
        self.logprobs += chunk.logprobs
        if chunk.finish:
            rest, self.calls = self._reader.flush()
            text += rest
            self.finish = "tool_calls" if self.calls else chunk.finish
        self.texts.append(text)
        return text


async def whole(
    head: Head, chunks: AsyncGenerator[Numbered], engine: Engine, tools: Sequence[str]
) -> dict[str, Any]:
    """The response to a request that is not streamed."""
    n = head.plans[0].request.n
    choices = [Choice(index, tools) for index in range(n)]
    num_prompt = 0
    async with aclosing(chunks):
        async for _, chunk in chunks:
            choices[chunk.index].take(chunk)
            num_prompt = num_prompt or chunk.num_prompt_tokens
    with_logprobs = head.plans[0].request.sampling.logprobs is not None
    return {
        **head.fields(),
        "choices": [
            {
                "index": choice.index,
                "message": _message(choice),
                "logprobs": _logprobs(choice.logprobs, engine) if with_logprobs else None,
                "finish_reason": choice.finish,
            }
            for choice in choices
        ],
        "usage": usage(num_prompt, sum(choice.num_tokens for choice in choices)),
        "loramix": head.chosen(),
    }


async def events(
    head: Head,
    chunks: AsyncGenerator[Numbered],
    engine: Engine,
    tools: Sequence[str],
    *,
    with_usage: bool,
) -> AsyncGenerator[bytes]:
    """The response as events: a delta for each piece of text, why it ended, maybe the usage."""
    request = head.plans[0].request
    choices = [Choice(index, tools) for index in range(request.n)]
    fields = head.fields(".chunk")
    begun: set[int] = set()
    num_prompt = 0
    async with aclosing(chunks):
        async for _, chunk in chunks:
            choice = choices[chunk.index]
            text = choice.take(chunk)
            num_prompt = num_prompt or chunk.num_prompt_tokens
            delta: dict[str, Any] = {}
            more: dict[str, Any] = {}
            if choice.index not in begun:
                delta["role"] = "assistant"
                more = {} if begun else {"loramix": head.chosen()}
                begun.add(choice.index)
            if text:
                delta["content"] = text
            if choice.calls:
                delta["tool_calls"] = [{"index": i, **c} for i, c in enumerate(_calls(choice))]
            data = b""
            if delta or choice.finish:
                shown, choice.logprobs = choice.logprobs, []
                values = _logprobs(shown, engine) if request.sampling.logprobs is not None else None
                part = {"index": choice.index, "delta": delta, "logprobs": values}
                data = event({**fields, "choices": [part | {"finish_reason": None}], **more})
            if choice.finish:
                last = {"index": choice.index, "delta": {}, "logprobs": None}
                data += event({**fields, "choices": [last | {"finish_reason": choice.finish}]})
            if data:
                yield data
    if with_usage:
        num_tokens = sum(choice.num_tokens for choice in choices)
        yield event({**fields, "choices": [], "usage": usage(num_prompt, num_tokens)})
    yield DONE


def _message(choice: Choice) -> dict[str, Any]:
    text = "".join(choice.texts)
    message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
    if choice.calls:
        message |= {"content": text or None, "tool_calls": _calls(choice)}
    return message


def _calls(choice: Choice) -> list[dict[str, Any]]:
    return [
        {
            "id": call.id,
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
        for call in choice.calls
    ]


def _logprobs(logprobs: Sequence[LogProb], engine: Engine) -> dict[str, Any]:
    content = [
        _token(own.token, own.value, engine)
        | {"top_logprobs": [_token(token, value, engine) for token, value in own.top]}
        for own in logprobs
    ]
    return {"content": content, "refusal": None}


def _token(token: int, value: float, engine: Engine) -> dict[str, Any]:
    """A token by itself; part of a character has no bytes to tell."""
    text = engine.text([token])
    known = "\ufffd" not in text
    return {"token": text, "logprob": value, "bytes": list(text.encode()) if known else None}
