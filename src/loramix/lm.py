"""A base, its library, its router and an engine, put together: open it and ask it.

    >>> import loramix
    >>> lm = loramix.open("pocket")  # doctest: +SKIP
    >>> lm.ask("my card was stolen").mix  # doctest: +SKIP
    Mix.parse('banking')

`auto` asks the router once per turn, before the model reads the prompt; any other mix goes to the
engine as it is. Adapters are read when a mix first names them. Importing this module loads
neither torch nor transformers; `open` does.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Self

from loramix.chat import Message
from loramix.engine import Answer, Chunk, Engine, Finish, Request, Sampling
from loramix.errors import BadRequest, RouteError, UnknownAdapter
from loramix.folders import POCKET_LIBRARY, default_library
from loramix.library import Library
from loramix.mix import Mix
from loramix.route import Decision, Router

if TYPE_CHECKING:
    from loramix.base import Base
    from loramix.route.feedback import CorrectedRouter

ROUTER = "_router"  # the subfolder of a library that holds its router

# Control characters but tabs and line breaks, and halves of characters (lone surrogates).
_CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")

Prompt = str | Sequence[Message]


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer, what answered, and why."""

    text: str
    mix: Mix  # what answered: ask with it again to replay
    scores: Mapping[str, float]  # the router's probability per adapter; empty if not asked
    none: float | None  # its probability that no adapter fits; None if not asked
    reasons: tuple[str, ...]
    usage: Usage
    ms: Mapping[str, float]  # "route" and "answer"; in a batch "answer" is that of the whole batch
    finish: Finish  # "length" means cut short at max_tokens


@dataclass(frozen=True, slots=True)
class Plan:
    """A request as it was routed; `decision` is None if the mix was given."""

    request: Request
    decision: Decision | None

    def reply(self, text: str, usage: Usage, finish: Finish, answer_ms: float) -> Reply:
        mix, chosen = self.request.mix, self.decision
        if chosen is None:
            return Reply(
                text, mix, {}, None, (), usage, {"route": 0.0, "answer": answer_ms}, finish
            )
        ms = {"route": chosen.latency_ms, "answer": answer_ms}
        return Reply(text, mix, chosen.scores, chosen.none, chosen.reasons, usage, ms, finish)


class Stream:
    """An answer as it appears: iterate for its chunks, then read `reply`.

    Leaving the loop early cancels the request.
    """

    def __init__(self, engine: Engine, plan: Plan) -> None:
        self._engine = engine
        self._plan = plan
        self._reply: Reply | None = None

    @property
    def mix(self) -> Mix:
        """The mix that answers, known before the first chunk."""
        return self._plan.request.mix

    @property
    def reply(self) -> Reply:
        """The whole answer; BadRequest before the last chunk was read."""
        if self._reply is None:
            raise BadRequest("The answer has not ended; read the stream to its end first.")
        return self._reply

    def __iter__(self) -> Iterator[Chunk]:
        start = perf_counter()
        chunks: list[Chunk] = []
        for chunk in _in_step(self._engine.stream(self._plan.request)):
            chunks.append(chunk)
            yield chunk
        text = "".join(chunk.text for chunk in chunks)
        usage = Usage(chunks[-1].num_prompt_tokens, sum(chunk.num_tokens for chunk in chunks))
        finish = chunks[-1].finish or "cancelled"
        self._reply = self._plan.reply(text, usage, finish, _ms_since(start))


class LM:
    """One frozen base that answers under any mix of a library's adapters."""

    def __init__(self, engine: Engine, library: Library, router: Router | None = None) -> None:
        self.engine = engine
        self.library = library
        self.router = router

    def ask(
        self, prompt: Prompt, mix: str | Mix = "auto", *, sampling: Sampling | None = None
    ) -> Reply:
        """Answer a text or a conversation; `mix` is a mix, its name, "base" or "auto".

        Raises BadRequest, MixError, RouteError, TooLong.
        """
        return self.ask_all([prompt], mix, sampling=sampling)[0]

    def ask_all(
        self,
        prompts: Sequence[Prompt],
        mix: str | Mix = "auto",
        *,
        sampling: Sampling | None = None,
    ) -> list[Reply]:
        """Answer many prompts, each routed by itself, in one running batch."""
        plans = [self._plan(prompt, mix, sampling) for prompt in prompts]
        start = perf_counter()
        answers = self.engine.generate([plan.request for plan in plans])
        ms = _ms_since(start)
        return [
            plan.reply(answer.text, _usage(answer), answer.finish, ms)
            for plan, answer in zip(plans, answers, strict=True)
        ]

    def stream(
        self, prompt: Prompt, mix: str | Mix = "auto", *, sampling: Sampling | None = None
    ) -> Stream:
        """Like `ask`, as it appears: `for chunk in lm.stream("..."): print(chunk.text)`."""
        return Stream(self.engine, self._plan(prompt, mix, sampling))

    def route(self, prompt: Prompt) -> Decision:
        """What the router makes of a prompt; RouteError if the library has no router."""
        if self.router is None:
            raise _no_router(self.library)
        return self.router.route(as_messages(prompt))

    def close(self) -> None:
        """Stop the engine; the LM cannot be asked afterwards."""
        self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _plan(self, prompt: Prompt, mix: str | Mix, sampling: Sampling | None) -> Plan:
        messages = as_messages(prompt)
        decision = self.route(messages) if mix == "auto" else None
        chosen = decision.mix if decision else as_mix(mix)
        told = guided(messages, chosen, self.library.system_prompt)
        return Plan(Request(told, chosen, sampling or Sampling()), decision)


@dataclass(slots=True)
class Conversation:
    """Turns with one LM; the history stays whatever mix answers."""

    lm: LM
    mix: str | Mix = "auto"
    sampling: Sampling = Sampling()
    turns: list[tuple[str, Reply]] = field(default_factory=list)

    @property
    def messages(self) -> tuple[Message, ...]:
        pairs = ((Message("user", q), Message("assistant", r.text)) for q, r in self.turns)
        return tuple(message for pair in pairs for message in pair)

    def say(self, text: str) -> Iterator[Chunk]:
        """Answer the next turn as it appears; the turn is kept once the answer has ended."""
        asked = (*self.messages, Message("user", text))
        stream = self.lm.stream(asked, self.mix, sampling=self.sampling)
        yield from stream
        self.turns.append((text, stream.reply))


def open(
    base: str = "pocket",
    library: str | Path | None = None,
    *,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    quantize: str = "none",
    router: bool | Router | Callable[[Base], Router] = True,
    engine: Mapping[str, Any] | None = None,
) -> LM:
    """Open a base by folder, hub id or "pocket", with the adapters of a library.

    Without `library`: pocket's own for pocket, else yours (`default_library`). `quantize` "int8"
    halves the base's memory (see `open_base`). Its router comes along unless `router` is false,
    another, or what makes one of the bare base. `engine` are options of `LocalEngine`.
    Raises BaseError, AdapterError, RouteError, EngineError.
    """
    from loramix.base import open_base
    from loramix.engine.local import LocalEngine

    shelf = Library(Path(library) if library else default_library(base))
    asked = None if isinstance(router, bool) else router
    if router is True and has_router(shelf):
        asked = load_router(shelf)
    opened = open_base(base, dtype=dtype, device=device, revision=revision, quantize=quantize)
    if callable(asked):
        asked = asked(opened)  # before the engine wraps it
    return LM(LocalEngine(opened, library=shelf, **engine or {}), shelf, asked)


def load_router(library: Library) -> CorrectedRouter:
    """The router fitted for a library, with the corrections beside it; RouteError if none.

    Adapters that it has not met are known to it by their cards.
    """
    if not has_router(library):
        raise _no_router(library)
    from loramix.route.feedback import CorrectedRouter, FeedbackLog
    from loramix.route.gate import GateRouter

    folder = library.folder / ROUTER
    gate = GateRouter.load(folder)
    if not {*library.names()} <= {*gate.adapters}:
        for card in library.cards():
            gate = gate if card.name in gate.adapters else gate.introduce(card)
    packaged = library.folder.resolve() == POCKET_LIBRARY.resolve()
    return CorrectedRouter(gate, FeedbackLog(folder, packaged=packaged))


def has_router(library: Library) -> bool:
    return (library.folder / ROUTER).is_dir()


def check_mix(mix: str, library: Library) -> None:
    """Raise before a model is opened what asking with this mix would raise afterwards."""
    if mix == "auto":
        if not has_router(library):
            raise _no_router(library)
        return
    known = library.names()
    for name in Mix.parse(mix):
        if name not in known:
            raise UnknownAdapter(name, known)


def as_messages(prompt: Prompt) -> tuple[Message, ...]:
    """A text as one user turn, a conversation as it is; BadRequest if nobody could answer it."""
    turns = (Message("user", prompt),) if isinstance(prompt, str) else tuple(prompt)
    if not turns or turns[-1].role not in ("user", "tool"):
        raise BadRequest("A conversation must end with a user's message; add the question.")
    if not any(turn.role == "user" for turn in turns):
        raise BadRequest("A conversation needs a user's message; add the question.")
    for turn in turns:
        if turn.role in ("system", "user"):
            _check_text(turn.content)
    return turns


def guided(
    messages: Sequence[Message], mix: Mix, prompt_of: Callable[[str], str]
) -> tuple[Message, ...]:
    """A conversation that brings no system message begins with its adapter's, if that has one.

    Of a mix, that of the heaviest adapter that has one; `prompt_of` knows them by name.
    """
    if any(message.role == "system" for message in messages):
        return tuple(messages)
    prompts = map(prompt_of, sorted(mix, key=lambda name: -abs(mix[name])))
    system = next(filter(None, prompts), "")
    return (Message("system", system), *messages) if system else tuple(messages)


def as_mix(mix: str | Mix) -> Mix:
    """A mix or the name of one; MixSyntaxError if it cannot be read."""
    return Mix.parse(mix) if isinstance(mix, str) else mix


def _no_router(library: Library) -> RouteError:
    return RouteError(
        f"The library {library.folder} has no router, which 'auto' asks for the mix; fit one with "
        f"`loramix route fit`, or name a mix ('base' is the bare model)."
    )


def _check_text(text: str) -> None:
    if not text.strip():
        raise BadRequest("The text is empty; expected a question or an instruction.")
    if found := _CONTROLS.search(text):
        raise BadRequest(
            f"The text holds the control character U+{ord(found[0]):04X} at position "
            f"{found.start()}; remove it (tabs and line breaks are fine)."
        )


def _in_step(chunks: AsyncIterator[Chunk]) -> Iterator[Chunk]:
    """An asynchronous stream for synchronous callers, also inside a running event loop.

    Its loop lives on a thread of its own. Closing this iterator early closes the stream, which
    cancels the request.
    """
    assert isinstance(chunks, AsyncGenerator), "engines stream with async generators"
    runner = asyncio.Runner()

    async def step() -> Chunk | None:
        return await anext(chunks, None)

    with ThreadPoolExecutor(1, "loramix-stream") as thread:
        try:
            while (chunk := thread.submit(runner.run, step()).result()) is not None:
                yield chunk
        finally:
            thread.submit(runner.run, chunks.aclose()).result()
            thread.submit(runner.close).result()


def _usage(answer: Answer) -> Usage:
    return Usage(answer.num_prompt_tokens, answer.num_tokens)


def _ms_since(start: float) -> float:
    return (perf_counter() - start) * 1000
