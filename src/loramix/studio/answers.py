"""Answers under way. They belong to no page: one that is reloaded finds its answer going on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

from loramix.errors import Conflict, LoramixError

LINGER_S = 10.0  # how long an answer goes on that nobody looks at: enough for a reload


class Answer:
    """One answer, as far as it has come."""

    def __init__(self, question: str | None, events: AsyncGenerator[dict[str, Any]]) -> None:
        self.question = question  # None where the last one is answered again
        self.text = ""
        self.chosen: dict[str, Any] = {}  # the mix and why, from the first event on
        self.kept: list[dict[str, Any]] = []  # the turns as the server keeps them, at the end
        self.error = ""
        self._num_readers = 0
        self._task = asyncio.create_task(self._read(events))

    @property
    def is_over(self) -> bool:
        return self._task.done()

    @property
    def is_lost(self) -> bool:
        """Whether nothing of it is kept: it failed, or was stopped before its first word."""
        return self.is_over and (bool(self.error) or not self.chosen)

    def as_turn(self) -> dict[str, Any]:
        """The turn that is kept of it. One that was stopped is kept after its reader has left."""
        if self.kept:
            return self.kept[-1]
        stopped = {"content": self.text, "finish": "cancelled", "completion_tokens": 0, "ms": 0}
        return self.chosen | stopped

    async def ended(self) -> None:
        await asyncio.wait([self._task])

    async def stop(self) -> None:
        """The server keeps what there is."""
        self._task.cancel()
        await self.ended()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """While somebody looks; some time after the last one it is stopped."""
        self._num_readers += 1
        try:
            yield
        finally:
            self._num_readers -= 1
            asyncio.get_running_loop().call_later(LINGER_S, self._stop_unseen)

    def _stop_unseen(self) -> None:
        if not self._num_readers:
            self._task.cancel()

    async def _read(self, events: AsyncGenerator[dict[str, Any]]) -> None:
        try:
            async with aclosing(events):
                async for event in events:
                    self._take(event)
        except LoramixError as error:
            self.error = str(error)

    def _take(self, event: dict[str, Any]) -> None:
        self.chosen = event.get("loramix", self.chosen)
        self.kept = event.get("turns", self.kept)
        for choice in event.get("choices", ()):
            self.text += choice["delta"].get("content", "")


class Answers:
    """The answers under way, by conversation: one at a time in each."""

    def __init__(self) -> None:
        self._under_way: dict[str, Answer] = {}

    def of(self, conversation: str) -> Answer | None:
        answer = self._under_way.get(conversation)
        return None if answer is None or answer.is_over else answer

    def begin(
        self, conversation: str, question: str | None, events: AsyncGenerator[dict[str, Any]]
    ) -> Answer:
        """Conflict while another page waits for an answer in this conversation."""
        if self.of(conversation):
            raise Conflict("This conversation is being answered; wait for that, or stop it.")
        answer = Answer(question, events)
        self._under_way = {id: each for id, each in self._under_way.items() if not each.is_over}
        self._under_way[conversation] = answer
        return answer

    async def ended(self) -> None:
        """Until none is under way: the server lets them end, or ends them, in its own time."""
        for answer in list(self._under_way.values()):
            await answer.ended()
