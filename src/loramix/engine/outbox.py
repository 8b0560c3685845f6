"""What the engine's thread has for an event loop gets there in one call, not one for each token."""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any


class Outbox:
    """Calls functions on an event loop, in order. Waking a loop costs more than a call in it.

    So the first call of a step wakes it, and the others are there when it comes. A loop that has
    ended is called no more.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self._calls: deque[tuple[Callable[[Any], None], Any]] = deque()
        self._is_on_its_way = False

    def put(self, call: Callable[[Any], None], value: object) -> None:
        """Have `call(value)` made on the loop soon; from any thread."""
        self._calls.append((call, value))
        if self._is_on_its_way:  # then it has not begun to empty the calls
            return
        self._is_on_its_way = True
        loop = self._loop()
        with contextlib.suppress(RuntimeError):  # the loop has ended, nobody is listening
            if loop is not None:
                loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._is_on_its_way = False  # before they are emptied: what comes now may need a new one
        while self._calls:
            call, value = self._calls.popleft()
            call(value)


class Outboxes:
    """One for each loop that streams are read on."""

    def __init__(self) -> None:
        self._boxes: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Outbox] = (
            weakref.WeakKeyDictionary()
        )

    def here(self) -> Outbox:
        """That of the running loop."""
        loop = asyncio.get_running_loop()
        if loop not in self._boxes:
            self._boxes[loop] = Outbox(loop)
        return self._boxes[loop]
