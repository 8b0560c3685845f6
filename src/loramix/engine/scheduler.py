"""Which tokens the next step computes, and what to remember of the last one.

Every step takes all requests that wait for one token, then chunks of prompts in order of arrival,
up to a budget of tokens: a long prompt never holds up those who are already answering. Requests
join and leave between any two steps. One joins when the keys and values it may come to need, at its
longest, fit the budget of bytes; finished requests' keys and values have what is left of it.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor

from loramix.engine import Statistics
from loramix.engine.attention import Span
from loramix.engine.cache import History, PrefixCache
from loramix.errors import EngineError
from loramix.gates import Gates
from loramix.mix import Mix

# What gates of their own cost neighbours of one mix, in products of a token with a rank column:
# hundreds of small calls. docs/log.md has the measurement.
OWN_GATES = 4000


class Covering(Protocol):
    def covering(self, names: Iterable[str], spare: float) -> Sequence[tuple[str, ...]]: ...


class Adapted(Protocol):
    """What gates are made for: `MixedModel`."""

    @property
    def ranks(self) -> Mapping[str, int]: ...

    @property
    def sets(self) -> Covering: ...


class Reader(Protocol):
    """What becomes of a task's logits: text that is written, or a score."""

    @property
    def finished(self) -> bool: ...

    def read(self, logits: Tensor) -> list[int]:
        """Take the next rows, [T, V], in order; return the tokens to compute next."""


@dataclass(slots=True, eq=False)
class Task:
    """A request at work.

    `weights` name adapters as they are bound to the model; `key` is what its keys and values may
    be shared under, and with `keep` it takes those of earlier turns under other keys. Logits are
    read from position `first_read` on. At most `limit` tokens are computed; 0 means those it has
    now. A task that comes `after` another of the same prompt and key begins where that one has
    computed the prompt.
    """

    tokens: list[int]
    first_read: int
    weights: tuple[tuple[str, float], ...]
    key: str
    reader: Reader
    limit: int = 0
    keep: bool = False
    after: Task | None = None
    done: Future[None] = field(default_factory=Future)
    history: History = field(default_factory=History)
    num_cached_tokens: int = 0
    num_kept_tokens: int = 0  # of these, of another mix

    def __post_init__(self) -> None:
        self.limit = self.limit or len(self.tokens)

    @property
    def mix(self) -> Mix:
        """Of the adapters' own names; those of `weights` say the file's content too."""
        return Mix({name.partition("@")[0]: weight for name, weight in self.weights})

    @property
    def num_pending(self) -> int:
        """Tokens that are known but not computed."""
        return len(self.tokens) - self.history.num_tokens

    def is_held_up(self) -> bool:
        """Whether the prompt is being computed for the task before; takes it over when it is."""
        if self.after is None:
            return False
        first = self.after
        if not first.done.done() and first.history.num_tokens < self.first_read:
            return True
        self.after = None
        if not first.done.done() and self.history.num_tokens < self.first_read:
            with contextlib.suppress(Exception):  # no memory for a copy: all of it is computed then
                self.history = first.history.prefix(self.first_read, self.limit)
                self.num_cached_tokens = self.history.num_tokens
        return False


@dataclass(frozen=True, slots=True)
class Part:
    """A task's share of a step: some rows of the packed row, some rows of the logits."""

    task: Task
    span: Span
    num_read: int  # the last so many rows have their logits read


@dataclass(frozen=True, slots=True)
class Batch:
    """One step: new tokens of several tasks, end to end in a row of N."""

    parts: Sequence[Part]

    @property
    def spans(self) -> list[Span]:
        return [part.span for part in self.parts]

    @property
    def tokens(self) -> list[int]:
        """N token ids."""
        return [
            token
            for part in self.parts
            for token in part.task.tokens[part.span.first : part.span.first + part.span.num_rows]
        ]

    @property
    def positions(self) -> list[int]:
        """N positions, each within its own request."""
        return [
            position
            for span in self.spans
            for position in range(span.first, span.first + span.num_rows)
        ]

    @property
    def read_rows(self) -> list[int]:
        """The rows whose logits are read, in order."""
        return [
            row
            for part in self.parts
            for row in range(part.span.end - part.num_read, part.span.end)
        ]

    def gates(self, model: Adapted, device: torch.device) -> list[Gates]:
        """The mixes of the step, side by side.

        Neighbours of one mix have gates of their own where that is cheaper: side by side, each of
        their tokens pays for the ranks of all. Such are long prompts, and large adapters with many
        requests each. Gates of the same tokens add up: those of the sets their adapters are in.
        """
        names = {name for part in self.parts for name, _ in part.task.weights}
        rank = sum(model.ranks[name] for name in names)

        def is_apart(parts: Sequence[Part]) -> bool:
            own = sum(model.ranks[name] for name, _ in parts[0].task.weights)
            return sum(part.span.num_rows for part in parts) * (rank - own) > OWN_GATES

        alike = [list(same) for _, same in groupby(self.parts, lambda part: part.task.weights)]
        gates: list[Gates] = []
        for apart, groups in groupby(alike, is_apart):
            runs = list(groups)
            for run in runs if apart else [[part for same in runs for part in same]]:
                if here := {name for part in run for name, _ in part.task.weights}:
                    sets = model.sets.covering(here, 0.0 if apart else 0.5)
                    gates += [_gates(run, names, device) for names in sets]
        end = self.spans[-1].end
        return [replace(own, span=None) if own.span == (0, end) else own for own in gates]


def _gates(parts: Sequence[Part], names: tuple[str, ...], device: torch.device) -> Gates:
    """One row of weights per token of neighbouring parts, [1, T, K], over these adapters.

    From the first part to the last that has any of them.
    """
    column = {name: k for k, name in enumerate(names)}
    here = [
        n for n, part in enumerate(parts) if any(name in column for name, _ in part.task.weights)
    ]
    parts = parts[here[0] : here[-1] + 1]
    rows = torch.zeros(len(parts), len(names))
    for n, part in enumerate(parts):
        for name, weight in part.task.weights:
            if name in column:
                rows[n, column[name]] = weight
    lengths = torch.tensor([part.span.num_rows for part in parts])
    weights = rows.repeat_interleave(lengths, dim=0)[None].to(device)
    return Gates(names, weights, span=(parts[0].span.start, parts[-1].span.end), keep=True)


def _turn(task: Task) -> tuple[bool, tuple[tuple[str, float], ...]]:
    """Those who wait for one token come first, neighbours of one mix together."""
    return (True, ()) if task.num_pending > 1 else (False, task.weights)


def step_failed(error: Exception) -> EngineError:
    failure = EngineError(f"A step of this request failed with {error!r}; send it again.")
    failure.__cause__ = error
    return failure


class Scheduler:
    """The running batch and the queue before it. Not thread-safe, except for `room`.

    A token's keys and values take `token_bytes`; all there are take at most `kv_bytes`. A task
    that needs more than that by itself must not be added: it would wait for ever.
    """

    def __init__(
        self,
        cache: PrefixCache,
        *,
        max_batch: int,
        max_queue: int,
        step_tokens: int,
        token_bytes: int = 0,
        kv_bytes: int = sys.maxsize,
    ) -> None:
        self.cache = cache
        self.token_bytes = token_bytes
        self.kv_bytes = kv_bytes
        self.max_batch = max_batch
        self._cache_bytes = cache.limit_bytes
        self.step_tokens = max(step_tokens, max_batch)  # all who wait for one token get it
        self.room = threading.Semaphore(max_queue)  # taken before `add`, given back on leaving
        self.waiting: deque[Task] = deque()
        self.running: list[Task] = []
        self._num_steps = 0
        self._num_prompt_tokens = 0
        self._num_cached_tokens = 0

    @property
    def is_idle(self) -> bool:
        return not self.waiting and not self.running

    def add(self, task: Task) -> None:
        self.waiting.append(task)

    def next_batch(self) -> Batch:
        """Decide what the next step computes; there is something to compute unless idle."""
        self._admit()
        parts: list[Part] = []
        start, budget = 0, self.step_tokens
        able = [task for task in self.running if not task.is_held_up()]
        for task in sorted(able, key=_turn):
            num_rows = min(task.num_pending, budget)
            if num_rows:
                span = Span(start, start + num_rows, task.history)
                end = span.first + num_rows
                num_read = max(0, end - max(task.first_read, span.first))
                parts.append(Part(task, span, num_read))
                start, budget = start + num_rows, budget - num_rows
        return Batch(parts)

    def record(self, batch: Batch, logits: Tensor) -> None:
        """Remember a step: its keys and values, and what the readers make of its logits."""
        self._num_steps += 1
        for part in batch.parts:
            part.task.history.advance(part.span.num_rows)
        for task in self.running:
            task.is_held_up()  # takes over a prompt before the task that computed it may be done
        row = 0
        for part in batch.parts:
            rows = logits[row : row + part.num_read]
            row += part.num_read
            if part.num_read:
                self._read(part.task, rows)

    def drop(self, task: Task, error: Exception | None = None) -> None:
        """End a task at once, freeing its memory; without an error it was cancelled."""
        if task.done.done():
            return
        if task in self.running:
            self._leave(task)
        else:
            self.waiting.remove(task)
            self.room.release()
        task.history = History()
        if error is None:
            task.done.cancel()
        else:
            task.done.set_exception(error)

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.max_batch:
            left = self.kv_bytes - self.reserved_bytes - self._most_bytes(self.waiting[0])
            if left < 0:
                return
            task = self.waiting[0]
            try:
                prefix = task.tokens[: task.first_read]
                task.history = self.cache.longest(task.key, prefix, task.limit, keep=task.keep)
            except Exception:  # no memory for a copy: all of it is computed then
                task.history = History(task.limit)
            self.waiting.popleft()
            self.room.release()
            task.num_cached_tokens = task.history.num_tokens
            self._num_prompt_tokens += len(task.tokens)
            self._num_cached_tokens += task.num_cached_tokens
            self.running.append(task)
            self.cache.resize(min(left, self._cache_bytes))

    def statistics(self, adapters: tuple[str, ...]) -> Statistics:
        """A moment's view; the one thing here that any thread may ask for."""
        running = self.running.copy()
        return Statistics(
            running=tuple(task.mix for task in running),
            waiting=tuple(task.mix for task in self.waiting.copy()),
            adapters=adapters,
            kv_used_bytes=sum(map(self._most_bytes, running)) + self.cache.size_bytes,
            kv_limit_bytes=self.kv_bytes,
            num_steps=self._num_steps,
            num_prompt_tokens=self._num_prompt_tokens,
            num_cached_tokens=self._num_cached_tokens,
        )

    @property
    def reserved_bytes(self) -> int:
        """What the running tasks' keys and values take at their longest."""
        return sum(map(self._most_bytes, self.running))

    def _most_bytes(self, task: Task) -> int:
        return task.limit * self.token_bytes

    def _leave(self, task: Task) -> None:
        self.running.remove(task)
        self.cache.resize(min(self.kv_bytes - self.reserved_bytes, self._cache_bytes))

    def _read(self, task: Task, logits: Tensor) -> None:
        try:
            task.tokens += task.reader.read(logits)
        except Exception as error:  # what cannot be read fails its own request only
            self.drop(task, step_failed(error))
        else:
            if task.reader.finished:
                self._finish(task)

    def _finish(self, task: Task) -> None:
        self._leave(task)
        tokens = task.tokens[: task.history.num_tokens]
        self.cache.store(task.key, tokens, task.history, task.first_read + 1)
        task.num_kept_tokens = task.history.num_kept
        task.history = History()  # a caller may hold the task for long
        task.done.set_result(None)
