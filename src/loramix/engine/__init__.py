"""An engine turns requests into text. Every request carries its own mix; a batch may hold many."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from loramix.chat import Message
from loramix.errors import BadRequest
from loramix.mix import Mix

Finish = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to pick the next token; None means the base's own generation config.

    Raises BadRequest for a value that cannot mean anything.
    """

    temperature: float | None = None  # 0 is greedy
    top_p: float | None = None
    top_k: int | None = None
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.temperature is not None and not 0 <= self.temperature <= 100:
            raise BadRequest(f"temperature is {self.temperature}; expected 0 (greedy) to 100.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise BadRequest(f"top_p is {self.top_p}; expected more than 0 and at most 1.")
        counts = {"top_k": 1 if self.top_k is None else self.top_k, "max_tokens": self.max_tokens}
        for name, value in counts.items():
            if type(value) is not int or value < 1:
                raise BadRequest(f"{name} is {value}; expected a whole number, at least 1.")
        if self.seed is not None and (type(self.seed) is not int or abs(self.seed) >= 1 << 63):
            raise BadRequest(f"seed is {self.seed}; expected a whole number of 64 bits.")
        if isinstance(self.stop, str):
            raise BadRequest("stop is one text; expected a tuple of texts.")
        if any(not text for text in self.stop):
            raise BadRequest("A stop string is empty; it would stop everything.")


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to continue, under one mix."""

    prompt: tuple[Message, ...] | str | tuple[int, ...]  # chat, raw text, or token ids
    mix: Mix = Mix()
    sampling: Sampling = Sampling()


@dataclass(frozen=True, slots=True)
class Chunk:
    """Text as it appears; the last chunk of a request says why it ended, and its prompt's size."""

    text: str
    num_tokens: int
    finish: Finish | None = None
    num_prompt_tokens: int = 0  # set on the last chunk, as in `Answer`


@dataclass(frozen=True, slots=True)
class Answer:
    """A finished request."""

    text: str
    tokens: tuple[int, ...]
    finish: Finish
    num_prompt_tokens: int
    num_cached_tokens: int = 0  # of the prompt, taken from the cache of the same mix

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)


class Engine(Protocol):
    """What the server, the benchmark and the search need from whatever runs the model."""

    def generate(self, requests: Sequence[Request]) -> list[Answer]:
        """Answer all requests as one running batch, in order."""

    def stream(self, request: Request) -> AsyncIterator[Chunk]:
        """Join the running batch and yield text as it comes; closing the iterator cancels."""

    def score(self, requests: Sequence[Request], continuations: Sequence[str]) -> list[float]:
        """Log-likelihood in nats of each continuation, summed over its tokens.

        Many mixes of one prompt are one batch: this is what search and the gate's targets run on.
        """
