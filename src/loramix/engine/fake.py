"""An engine without a model: says which mix answered. For tests and documents."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

from loramix.adapter import Adapter
from loramix.engine import Answer, Chunk, Finish, Request, Statistics
from loramix.errors import BadRequest


class FakeEngine:
    """Answers "<mix>: <last message>", one word per chunk and per token; instant.

    `max_tokens` cuts it short; sampling has nothing else to choose from.
    """

    base_id = "fake"

    def text(self, tokens: Sequence[int]) -> str:
        return " ".join(map(str, tokens))

    def statistics(self) -> Statistics:
        return Statistics()

    def add(self, adapter: Adapter) -> None:
        """It knows no adapters."""

    def forget(self, name: str) -> None:
        """It knows no adapters."""

    def generate(self, requests: Sequence[Request]) -> list[Answer]:
        return [
            replace(_answer(request), index=n) for request in requests for n in range(request.n)
        ]

    async def stream(self, request: Request) -> AsyncIterator[Chunk]:
        answer = _answer(request)
        words = answer.text.split(" ")
        for n in range(request.n):
            for word in words[:-1]:
                yield Chunk(word + " ", num_tokens=1, index=n)
            yield Chunk(words[-1], 1, answer.finish, answer.num_prompt_tokens, index=n)

    def close(self) -> None:
        """It holds nothing."""

    def score(self, requests: Sequence[Request], continuations: Sequence[str]) -> list[float]:
        """One nat per word that the answer does not have at that place."""
        pairs = zip(requests, continuations, strict=True)
        return [-float(_misses(_answer(request).text, text)) for request, text in pairs]


def _answer(request: Request) -> Answer:
    words = f"{request.mix}: {_last(request)}".split(" ")
    finish: Finish = "length" if len(words) > request.sampling.max_tokens else "stop"
    words = words[: request.sampling.max_tokens]
    return Answer(" ".join(words), tuple(range(len(words))), finish, len(_last(request).split(" ")))


def _last(request: Request) -> str:
    """The last message, the text, or the tokens as text."""
    if not request.prompt:
        raise BadRequest("The prompt is empty; expected at least one token.")
    if isinstance(request.prompt, str):
        return request.prompt
    last = request.prompt[-1]
    return str(last) if isinstance(last, int) else last.content


def _misses(answer: str, text: str) -> int:
    told, wanted = answer.split(" "), text.split(" ")
    return sum(told[i : i + 1] != [word] for i, word in enumerate(wanted))
