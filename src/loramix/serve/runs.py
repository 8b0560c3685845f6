"""Tasks at work: an answer in the making, whoever waits for it, and how its end is recorded."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from loramix.errors import LoramixError, StoreError, TaskCancelled
from loramix.lm import Plan
from loramix.serve.answering import Numbered, answers, in_time
from loramix.serve.conversations import Place
from loramix.serve.service import Service, Trip
from loramix.serve.shapes import Chosen, Head, UsageBody, usage
from loramix.store.records import Status, Task

DAY_S = 24 * 3600.0
SWEEP_S = 3600.0  # between two looks for tasks that are over for long

log = logging.getLogger("loramix.serve")


class Output(BaseModel):
    """What every workflow gives."""

    text: str
    finish: str
    usage: UsageBody
    loramix: Chosen


def abandon(service: Service) -> None:
    """At the start: fail the open tasks of servers that have ended.

    The only server of its database has none under way yet. A database that is shared holds those
    of other servers, so there only tasks that are older than any task may get are failed.
    """
    if (store := service.store) is None:
        return
    grace_s = service.limits.timeout_s + service.limits.shutdown_s if store.is_shared else 0.0
    store.tasks.abandon(time.time() - grace_s, "Its server ended before it was done; run it again.")


async def expire(service: Service) -> None:
    """While the server runs: forget the tasks, with prompts and outputs, that are over for long."""
    while service.store is not None:
        before = time.time() - service.limits.task_days * DAY_S
        try:
            await asyncio.to_thread(service.store.tasks.expire, before)
        except StoreError as error:  # told to whoever asks; the database may be back later
            log.warning("tasks", extra={"facts": {"error": str(error)}})
        await asyncio.sleep(SWEEP_S)


async def ended(service: Service) -> None:
    """Until no task is at work here."""
    await asyncio.gather(*service.live.runs.values(), return_exceptions=True)


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """A task at work in this server."""

    service: Service
    trip: Trip
    task: Task
    plan: Plan
    place: Place | None  # where its answer goes in a conversation
    texts: asyncio.Queue[str | None] = field(default_factory=asyncio.Queue)  # None is the end

    def start(self) -> asyncio.Task[Output]:
        working = asyncio.create_task(self._work())
        self.service.live.runs[self.task.id] = working
        self.trip.work.append(working)
        working.add_done_callback(self._note)
        return working

    async def outcome(self, working: asyncio.Task[Output]) -> Output:
        """What it comes to, or its error; whoever stops waiting cancels it."""
        try:
            await asyncio.wait([working])
        finally:
            working.cancel()
        if working.cancelled():
            raise TaskCancelled(self.task.id)
        return working.result()

    async def read(self) -> Task:
        return await asyncio.to_thread(
            self.service.kept.tasks.get, self.task.id, (self.task.owner,)
        )

    async def _work(self) -> Output:
        try:
            async with in_time(self.service, self.trip):
                output = await self._answered()
            await self._set("completed", output=output.model_dump())
            return output
        except asyncio.CancelledError:
            # A stream's own clock may have been the first to tell that the time is over.
            late_s = self.trip.age_s - self.service.limits.timeout_s
            if late_s >= 0:
                await self._over("failed", "It took longer than a request may; ask for less.")
            else:
                await self._over("cancelled")
            raise
        except LoramixError as error:
            await self._over("failed", str(error))
            raise
        except Exception:
            await self._over("failed", f"A fault of the server; its log has {self.trip.trace}.")
            raise
        finally:
            self.texts.put_nowait(None)

    async def _answered(self) -> Output:
        head = Head((self.plan,), self.trip, "chat.completion")
        chunks: list[Numbered] = []
        async with aclosing(answers(self.service, self.trip, head.plans)) as stream:
            async for numbered in stream:
                if not chunks:
                    await self._set("processing")
                chunks.append(numbered)
                self.texts.put_nowait(numbered[1].text)
        last = chunks[-1][1]
        finish = last.finish or "cancelled"
        if self.place:
            await self.place.keep(head, chunks, finish)
        num_tokens = sum(chunk.num_tokens for _, chunk in chunks)
        return Output(
            text="".join(chunk.text for _, chunk in chunks),
            finish=finish,
            usage=UsageBody.model_validate(usage(last.num_prompt_tokens, num_tokens)),
            loramix=Chosen.model_validate(head.chosen()),
        )

    async def _set(self, status: Status, output: Any = None) -> None:
        """TaskCancelled if somebody did that, perhaps at another server of the database."""
        tasks = self.service.kept.tasks
        if not await asyncio.to_thread(tasks.set, self.task.id, status, output=output):
            raise TaskCancelled(self.task.id)

    async def _over(self, status: Status, error: str = "") -> None:
        """Record the end, unless there is one."""
        await asyncio.to_thread(self.service.kept.tasks.set, self.task.id, status, error=error)

    def _note(self, working: asyncio.Task[Output]) -> None:
        self.service.live.runs.pop(self.task.id, None)
        error = None if working.cancelled() else working.exception()
        end = "cancelled" if working.cancelled() else "failed" if error else "completed"
        facts = {**self.trip.facts, "trace": self.trip.trace, "task": self.task.id, "end": end}
        if error:
            facts["error"] = str(error)
        bug = None if isinstance(error, LoramixError) else error
        log.log(
            logging.ERROR if bug else logging.INFO, "task", exc_info=bug, extra={"facts": facts}
        )
