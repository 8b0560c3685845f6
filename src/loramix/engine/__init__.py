"""An engine turns requests into text. Every request carries its own mix; a batch may hold many."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from loramix.adapter import Adapter
from loramix.chat import Message
from loramix.errors import BadRequest
from loramix.mix import Mix

Finish = Literal["stop", "length", "cancelled"]
MAX_ANSWERS = 128  # to one request
MAX_BIAS = 1000  # more would change nothing: logits are tens
MAX_LOGPROBS = 20  # alternatives that can be asked for at each token, as in OpenAI's API


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to pick the next token; None means the base's own generation config.

    `presence_penalty` and `frequency_penalty` count tokens of the answer, as OpenAI's do;
    `repetition_penalty` counts those of the prompt as well (https://arxiv.org/abs/1909.05858).
    Raises BadRequest for a value that cannot mean anything.
    """

    temperature: float | None = None  # 0 is greedy
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None  # least probability, as a share of the likeliest token's
    max_tokens: int = 256
    fit: bool = False  # max_tokens becomes what the prompt leaves of the context, if that is less
    stop: tuple[str, ...] = ()
    seed: int | None = None
    repetition_penalty: float | None = None  # divides logits of what was said; 1 is none
    presence_penalty: float = 0.0  # taken off the logit of a token that was said
    frequency_penalty: float = 0.0  # taken off for each time that it was said
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)  # added, by token
    logprobs: int | None = None  # how many alternatives to report beside each token's own
    prompt_logprobs: int | None = None  # the same for the prompt's tokens
    schema: str | None = None  # a JSON schema that the whole answer follows

    def __post_init__(self) -> None:
        if self.temperature is not None and not 0 <= self.temperature <= 100:
            raise BadRequest(f"temperature is {self.temperature}; expected 0 (greedy) to 100.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise BadRequest(f"top_p is {self.top_p}; expected more than 0 and at most 1.")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise BadRequest(f"min_p is {self.min_p}; expected 0 to 1.")
        if self.repetition_penalty is not None and not 0 < self.repetition_penalty <= 100:
            raise BadRequest(
                f"repetition_penalty is {self.repetition_penalty}; expected more than 0, 1 for "
                f"none, at most 100."
            )
        for name in ("presence_penalty", "frequency_penalty"):
            if not -100 <= getattr(self, name) <= 100:
                raise BadRequest(f"{name} is {getattr(self, name)}; expected -100 to 100.")
        for token, value in self.logit_bias.items():
            if type(token) is not int or not -MAX_BIAS <= value <= MAX_BIAS:
                raise BadRequest(
                    f"logit_bias of {token!r} cannot be used; expected whole numbers as tokens and "
                    f"values of -{MAX_BIAS} to {MAX_BIAS}."
                )
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or not 0 <= value <= MAX_LOGPROBS):
                raise BadRequest(
                    f"{name} is {value}; expected a whole number of 0 to {MAX_LOGPROBS}."
                )
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
    """One prompt to continue, under one mix, `n` times.

    With a seed, the first of n answers is the one that n = 1 gives, and each has its own random
    numbers. `history` says what becomes of earlier turns that were computed under another mix:
    "exact" computes them again under this one; "keep" keeps their keys and values, if they are
    still in memory, and applies this mix from the next token on. That is faster, an approximation,
    and not repeatable by the name of the mix; `Answer.num_kept_tokens` says how much was kept.
    `template` is what the base's chat template is told besides the messages (`chat.prompt_ids`).
    """

    prompt: tuple[Message, ...] | str | tuple[int, ...]  # chat, raw text, or token ids
    mix: Mix = Mix()
    sampling: Sampling = Sampling()
    n: int = 1
    history: Literal["exact", "keep"] = "exact"
    template: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if type(self.n) is not int or not 1 <= self.n <= MAX_ANSWERS:
            raise BadRequest(f"n is {self.n}; expected a whole number of 1 to {MAX_ANSWERS}.")
        if self.history not in ("exact", "keep"):
            raise BadRequest(f"history is {self.history!r}; expected 'exact' or 'keep'.")


@dataclass(frozen=True, slots=True)
class LogProb:
    """How likely the model found a token of the answer, before sampling settings change that."""

    token: int
    value: float  # natural logarithm of its probability
    top: tuple[tuple[int, float], ...]  # the likeliest tokens and theirs, best first


@dataclass(frozen=True, slots=True)
class Chunk:
    """Text as it appears; the last chunk of an answer says why it ended, and its prompt's size."""

    text: str
    num_tokens: int
    finish: Finish | None = None
    num_prompt_tokens: int = 0  # set on the last chunk, as in `Answer`
    logprobs: tuple[LogProb, ...] = ()  # of these tokens, if asked for
    index: int = 0  # of the answer, where a request has several
    prompt_logprobs: tuple[LogProb, ...] = ()  # on the first chunk, as in `Answer`


@dataclass(frozen=True, slots=True)
class Answer:
    """A finished answer."""

    text: str
    tokens: tuple[int, ...]
    finish: Finish
    num_prompt_tokens: int
    num_cached_tokens: int = 0  # of the prompt, not computed for this answer
    num_kept_tokens: int = 0  # of these, computed under another mix (`history="keep"`)
    logprobs: tuple[LogProb, ...] = ()  # of each token, if asked for
    index: int = 0  # where a request has several
    prompt_logprobs: tuple[LogProb, ...] = ()  # of each token, if asked for; the first one's is NaN

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, slots=True)
class Statistics:
    """What an engine is doing, and has done since it was opened."""

    is_open: bool = True
    running: tuple[Mix, ...] = ()  # one for each answer at work
    waiting: tuple[Mix, ...] = ()
    adapters: tuple[str, ...] = ()  # in memory
    kv_used_bytes: int = 0  # reserved by answers at work, or held for later ones
    kv_limit_bytes: int = 0
    num_steps: int = 0
    num_prompt_tokens: int = 0  # of all requests that began
    num_cached_tokens: int = 0  # of these, not computed because an earlier request had


class Engine(Protocol):
    """What the server, the benchmark and the search need from whatever runs the model."""

    @property
    def base_id(self) -> str:
        """What clients call the bare base by."""

    def text(self, tokens: Sequence[int]) -> str:
        """What tokens read as, special ones included; what is no whole character reads U+FFFD."""

    def statistics(self) -> Statistics:
        """A moment's view, from any thread."""

    def add(self, adapter: Adapter) -> None:
        """Take in an adapter from memory, beside those of the library, until it is forgotten."""

    def forget(self, name: str) -> None:
        """An adapter of the library changed or left: read it anew when a mix next names it.

        Requests at work keep the content they began with.
        """

    def generate(self, requests: Sequence[Request]) -> list[Answer]:
        """Answer all requests as one running batch; the `n` answers of each, in order."""

    def stream(self, request: Request) -> AsyncIterator[Chunk]:
        """Join the running batch and yield text as it comes; closing the iterator cancels."""

    def score(self, requests: Sequence[Request], continuations: Sequence[str]) -> list[float]:
        """Log-likelihood in nats of each continuation, summed over its tokens.

        Many mixes of one prompt are one batch: this is what search and the gate's targets run on.
        """

    def close(self) -> None:
        """Fail what is unfinished and free the model; may be repeated."""
