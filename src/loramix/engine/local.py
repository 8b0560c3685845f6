"""The engine in this process: one running batch in which every request has its own mix.

Prompts are read and checked by the caller's thread (prompts.py, job.py); the model runs in one of
its own (core.py).
`generate`, `stream` and `score` all join the same running batch.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import weakref
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Self

from loramix.adapter import Adapter
from loramix.base import Base
from loramix.engine import Answer, Chunk, Request, Statistics
from loramix.engine.cache import PrefixCache
from loramix.engine.core import Core
from loramix.engine.exact import exact_context, require_exact, vocabulary_size
from loramix.engine.job import Job, Jobs
from loramix.engine.loaded import LoadedAdapters
from loramix.engine.outbox import Outboxes
from loramix.engine.prompts import Prompts, is_slow
from loramix.engine.residents import Resident
from loramix.engine.scheduler import Scheduler, Task
from loramix.errors import BadRequest, Busy, EngineError, UnknownAdapter
from loramix.library import Library
from loramix.tiles import tiler_of

GIB = 1 << 30


class LocalEngine:
    """Serves a base and its adapters; close it, or use it in a `with` block.

    At most `max_batch` requests run at once and `max_queue` wait. A prompt and its answer have at
    most `context` tokens, or as many as the base holds. A step computes up to `step_tokens` new
    tokens. Keys and values take at most `kv_bytes`: those of running requests
    first, and with `reuse` those of finished ones, for requests of the same mix that begin alike.
    Adapters take at most `adapter_bytes`, not counting the side-by-side copies of up to 4 recent
    sets of them. Those that a mix names are read from `library` when first needed, and idle ones of
    these leave, longest unused first; those given to the engine stay. While the engine is open the
    base's model is its own. With `tiles`, products of few rows with a bfloat16 base and its
    adapters are made by a C function that is compiled now (tiles.py), and the base is laid out for
    it: faster, and rounded a little differently. None is wherever it can be had and a base is so
    large that a few seconds at its opening are little.

    Raises EngineError for what `tiles` needs and is not there and for a model that it cannot serve
    exactly, BaseMismatch for an adapter that does not fit.
    """

    def __init__(
        self,
        base: Base,
        adapters: Iterable[Adapter] = (),
        library: Library | None = None,
        *,
        max_batch: int = 32,
        max_queue: int = 1024,
        context: int | None = None,
        step_tokens: int = 512,
        kv_bytes: int = 2 * GIB,
        reuse: bool = True,
        adapter_bytes: int = sys.maxsize,
        num_threads: int | None = None,
        tiles: bool | None = None,
    ) -> None:
        if num_threads is not None and (type(num_threads) is not int or num_threads < 1):
            raise EngineError(f"num_threads is {num_threads}; expected at least 1, or None.")
        tiler = tiler_of(base.model, tiles)
        self.has_tiles = tiler is not None
        self.token_bytes = require_exact(base.model)  # of keys and values
        self.base = base
        self.library = library
        self.context = _context(base, context)
        self.cache = PrefixCache(kv_bytes if reuse else 0)
        self._scheduler = Scheduler(
            self.cache,
            max_batch=max_batch,
            max_queue=max_queue,
            step_tokens=step_tokens,
            token_bytes=self.token_bytes,
            kv_bytes=kv_bytes,
        )
        self._max_queue = max_queue
        self._outboxes = Outboxes()
        self._core = Core(
            base.model, self._scheduler, num_threads, tiler, together=self._outboxes.together
        )
        self._loaded = LoadedAdapters(base, library, self._core, adapter_bytes)
        vocabulary = vocabulary_size(base.model)
        prompts = Prompts(
            base.tokenizer,
            vocabulary,
            context=self.context,
            token_bytes=self.token_bytes,
            kv_bytes=kv_bytes,
        )
        self._jobs = Jobs(base, prompts, vocabulary)
        self._core.start()
        self._closer = weakref.finalize(self, self._core.close)
        try:
            for adapter in adapters:
                self.add(adapter)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Fail what is unfinished with EngineError and end the thread; may be repeated."""
        self._closer()

    @property
    def base_id(self) -> str:
        """What clients call the bare base by."""
        return self.base.id

    def text(self, tokens: Sequence[int]) -> str:
        """What tokens read as, special ones included; what is no whole character reads U+FFFD."""
        return str(self.base.tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False))

    def statistics(self) -> Statistics:
        """A moment's view, from any thread."""
        moment = self._scheduler.statistics(self.adapters)
        return replace(moment, is_open=self._core.is_open)

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters in memory, sorted."""
        return self._loaded.names

    def add(self, adapter: Adapter, *, aligned: bool = True) -> None:
        """Add an adapter, or replace the one of its name, for requests that come from now on.

        It takes the base's precision, or keeps its own if not `aligned` (a float32 adapter on a
        bfloat16 base), and stays until it is removed or replaced. Requests at work keep the content
        they began with. Raises BaseMismatch, AdapterError for one larger than all may be together,
        Busy if those at work leave no room.
        """
        self._loaded.add(adapter, aligned=aligned)

    def remove(self, name: str) -> None:
        """Forget an adapter in memory; requests at work finish. Raises UnknownAdapter.

        One that the library holds is read again when a mix names it.
        """
        self._loaded.remove(name)

    def forget(self, name: str) -> None:
        """Read an adapter anew when a mix next names it; nothing if it is not in memory."""
        with contextlib.suppress(UnknownAdapter):
            self.remove(name)

    def generate(self, requests: Sequence[Request]) -> list[Answer]:
        """Answer all requests as one running batch; wait while the queue is full.

        The answers are in order, the `n` of a request one after the other. All requests are checked
        before any is begun. Raises BadRequest, TooLong, UnknownAdapter, and when one of them fails
        EngineError, or AdapterError if it was an adapter that cannot be read or does not fit; the
        others are then cancelled.
        """
        written = [one for request in requests for one in self._jobs.written(request, _ignore)]
        tasks = self._finish([job for job, _ in written])
        return [
            writer.answer(task.num_cached_tokens, task.num_kept_tokens)
            for (_, writer), task in zip(written, tasks, strict=True)
        ]

    def score(self, requests: Sequence[Request], continuations: Sequence[str]) -> list[float]:
        """Log-likelihood in nats of each continuation, summed over its tokens, as one batch.

        The continuation of a text is cut into tokens together with the text if that leaves the
        text's own tokens as they are, else by itself; that of messages or tokens always by itself.
        No end token is added, and `sampling` plays no part. Raises as `generate` does, and
        BadRequest for a continuation without tokens.
        """
        if len(requests) != len(continuations):
            raise BadRequest(
                f"{len(requests)} requests and {len(continuations)} continuations; expected pairs."
            )
        if any(request.n != 1 or request.history != "exact" for request in requests):
            raise BadRequest("A score is one and exact; leave n and history as they are.")
        scored = [self._jobs.scored(*pair) for pair in zip(requests, continuations, strict=True)]
        self._finish([job for job, _ in scored])
        return [scorer.total for _, scorer in scored]

    async def stream(self, request: Request) -> AsyncIterator[Chunk]:
        """Join the running batch and yield text as it comes; closing the iterator cancels.

        Raises BadRequest, TooLong, UnknownAdapter, AdapterError, Busy when the queue or the memory
        for adapters is full, EngineError.
        """
        events: asyncio.Queue[Chunk | None] = asyncio.Queue()
        send = partial(self._outboxes.here().put, events.put_nowait)
        if request.n > self._max_queue:
            raise BadRequest(f"n is {request.n}, but at most {self._max_queue} may wait at once.")
        write = partial(self._jobs.written, request, send)
        written = await asyncio.to_thread(write) if is_slow(request) else write()
        jobs = [job for job, _ in written]
        await self._loaded.read(request.mix)
        ready: list[Task] = []
        tasks: list[Task] = []
        try:
            for job in jobs:
                ready.append(self._task(job, ready[-1:], wait=False))
                ready[-1].done.add_done_callback(lambda _: send(None))
            self._submit(ready, tasks)
            num_done = 0
            while num_done < len(tasks):
                if (chunk := await events.get()) is not None:
                    yield chunk
                    continue
                num_done += 1
                for task in tasks:
                    if task.done.done():
                        task.done.result()
        finally:
            for task in ready:
                self._abandon(task)
            for task in tasks:
                self._core.cancel(task)

    def _finish(self, jobs: Sequence[Job]) -> list[Task]:
        """Run all jobs to their end; if one fails, or the caller gives up, cancel the rest."""
        self._loaded.require_known(name for job in jobs for name in job.request.mix)
        submitted: list[Task] = []
        ready: list[Task] = []  # those that begin together, so equal lists make equal batches
        try:
            for job in jobs:
                before = ready[-1:] or submitted[-1:]
                try:
                    ready.append(self._task(job, before, wait=False))
                except Busy:
                    self._submit(ready, submitted)
                    ready.append(self._task(job, before, wait=True))
            self._submit(ready, submitted)
            for task in submitted:
                task.done.result()
        finally:
            for task in ready:
                self._abandon(task)
            for task in submitted:
                self._core.cancel(task)
        return submitted

    def _submit(self, ready: list[Task], submitted: list[Task]) -> None:
        """Move tasks from one list to the other as they are submitted."""
        self._core.submit(tuple(ready))
        submitted += ready
        ready.clear()

    def _task(self, job: Job, before: Sequence[Task], *, wait: bool) -> Task:
        """A job with its adapters and a place in the queue; to be submitted, or abandoned.

        `before` is the task of the request's answer before this one, if it has any.
        """
        if not self._scheduler.room.acquire(blocking=wait):
            raise Busy("The queue is full; try again when some requests have ended.")
        held: list[Resident] = []
        try:
            mix = job.request.mix
            held = self._loaded.hold(mix, wait=wait)
            weights = tuple((r.bound, w) for r, w in zip(held, mix.values(), strict=True))
            task = Task(
                list(job.tokens),
                first_read=job.first_read,
                weights=weights,
                key=" ".join([str(mix), *(name for name, _ in weights)]),
                reader=job.reader,
                limit=job.limit,
                keep=job.request.history == "keep",
                after=before[0] if job.index else None,
            )
            if task.after and task.after.key != task.key:  # an adapter was replaced in between
                task.after = None
        except BaseException:
            self._loaded.release(held)
            self._scheduler.room.release()
            raise
        task.done.add_done_callback(lambda _: self._loaded.release(held))
        return task

    def _abandon(self, task: Task) -> None:
        """Let go what a task has that was never submitted."""
        task.done.cancel()
        self._scheduler.room.release()


def _context(base: Base, wanted: int | None) -> int:
    """The tokens of a prompt and its answer together; EngineError for what the base cannot hold."""
    held = exact_context(base)
    if wanted is None:
        return held
    if type(wanted) is not int or not 2 <= wanted <= held:
        raise EngineError(
            f"context is {wanted}; expected 2 to {held}, what this base holds, or None."
        )
    return wanted


def _ignore(chunk: Chunk) -> None:
    """Nobody watches this answer as it appears."""
