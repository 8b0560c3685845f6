"""The thread that owns the model: it computes one step after another and obeys calls in between.

Everything that touches the model, the running batch or the cache happens on this thread, so none
of it needs a lock. Others send it functions to call.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from loramix.adapter import Adapter
from loramix.engine.attention import StepCache, configs, packed
from loramix.engine.scheduler import Batch, Scheduler, Task, step_failed
from loramix.engine.threads import rest, sensible_threads
from loramix.errors import EngineError
from loramix.frozen import FrozenLayers
from loramix.mixed import MixedLinear, MixedModel
from loramix.threads import single_threaded
from loramix.tiles import Tiler

CLOSED = "The engine is closed; open a new one."


class Core:
    """A model, its running batch, and the thread that moves them on."""

    def __init__(
        self,
        model: PreTrainedModel,
        scheduler: Scheduler,
        num_threads: int | None = None,
        tiler: Tiler | None = None,
        together: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """`together` is around what a step has to tell, so that it is told at once."""
        self.frozen = FrozenLayers(model, tiler)
        self.mixed = MixedModel(model, tiler)
        self.model = model
        self._native = tiler.native if tiler else None
        self.scheduler = scheduler
        self._configs = configs(model)
        self._users: Counter[str] = Counter()  # of each adapter bound to the model
        self._calls: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._together = together
        self._num_threads = num_threads or sensible_threads()
        self._lock = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="loramix-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def is_open(self) -> bool:
        return not self._closed

    def close(self) -> None:
        """Fail what is unfinished, end the thread, give the model back as it was."""
        with self._lock:
            self._closed = True
            self._calls.put(lambda: None)  # wakes the thread
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join()
        self.mixed.release()
        self.frozen.release()

    def post(self, call: Callable[[], None]) -> None:
        """Have the thread call this before its next step. Raises EngineError once closed."""
        rest()  # before the call is made: nothing may fail after it
        with self._lock:
            if self._closed:
                raise EngineError(CLOSED)
            self._calls.put(call)

    def submit(self, tasks: Sequence[Task]) -> None:
        """Add tasks, all before the next step; each holds its adapters until it is done."""

        def take() -> None:
            for task in tasks:
                if task.done.done():
                    continue  # given up meanwhile
                for name, _ in task.weights:
                    self._users[name] += 1
                task.done.add_done_callback(partial(self._leave, task))
                self.scheduler.add(task)

        self.post(take)

    def cancel(self, task: Task) -> None:
        with contextlib.suppress(EngineError):  # closed: then it has failed already
            self.post(lambda: self.scheduler.drop(task))

    def bind(self, adapter: Adapter, name: str, dtype: torch.dtype | None) -> Future[None]:
        """Make an adapter available to tasks that are submitted from now on. Counts as a user.

        It is held in `dtype`, or in its own precision. Done when the model has it. Raises
        BaseMismatch.
        """
        self.mixed.check(adapter)
        with single_threaded():  # and here, so the steps go on meanwhile
            updates = self.mixed.prepared(adapter, dtype)

        bound: Future[None] = Future()

        def take() -> None:
            try:
                if not self._users[name]:
                    self.mixed.take(name, adapter.digest, updates)
                self._users[name] += 1
                bound.set_result(None)
            except Exception as error:
                bound.set_exception(error)

        self.post(take)
        return bound

    def unbind(self, name: str) -> None:
        """One user less; the adapter leaves the model after its last."""
        self.post(lambda: self._release(name))

    def forward(self, batch: Batch) -> Tensor:
        """Logits [M, V] in float32 of the rows that are read; the batch's histories grow."""
        device = self.model.device
        rows = torch.tensor(batch.read_rows, dtype=torch.long, device=device)  # maybe none
        # The gates count the tokens of the whole row, so an adapted output layer must see it whole.
        model: Any = self.model
        head = model.get_output_embeddings()
        whole = isinstance(head, MixedLinear) and bool(head.bound)
        self.frozen.suit(len(batch.parts))
        self.mixed.sets.tidy()
        gates = batch.gates(self.mixed, device)
        with torch.inference_mode(), self.mixed.active.using(*gates):
            with packed(self._configs):
                output = self.model(
                    input_ids=torch.tensor([batch.tokens], device=device),
                    position_ids=torch.tensor([batch.positions], device=device),
                    past_key_values=StepCache(batch.spans, self._native),
                    use_cache=True,
                    logits_to_keep=0 if whole else rows,
                )
            logits: Tensor = output.logits[0]
            return (logits[rows] if whole else logits).float()

    def _run(self) -> None:
        try:
            torch.set_num_threads(self._num_threads)
            while not self._closed:
                if self.scheduler.is_idle:
                    rest()
                    self._calls.get()()
                self._obey()
                if not self.scheduler.is_idle:
                    self._step()
        finally:  # also if a call was wrong: nobody may wait for ever
            with self._lock:
                self._closed = True
            self._obey()
            for task in [*self.scheduler.running, *self.scheduler.waiting]:
                self.scheduler.drop(task, EngineError(CLOSED))

    def _step(self) -> None:
        batch = self.scheduler.next_batch()
        try:
            logits = self.forward(batch)
            with self._together():
                self.scheduler.record(batch, logits)
        except Exception as error:
            for part in batch.parts:
                self.scheduler.drop(part.task, step_failed(error))

    def _obey(self) -> None:
        """Make the calls that have come."""
        with contextlib.suppress(Empty):
            while True:
                self._calls.get_nowait()()

    def _leave(self, task: Task, done: Future[None]) -> None:
        for name, _ in task.weights:
            self._release(name)

    def _release(self, name: str) -> None:
        self._users[name] -= 1
        if not self._users[name]:
            del self._users[name]
            self.mixed.unbind(name)
