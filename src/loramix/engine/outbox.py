"""What the engine's thread has for an event loop gets there in one call, not one for each token."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any


class Outbox:
    """Calls functions on an event loop, in order. Waking a loop costs more than a call in it.

    So one call wakes it, and those made until it comes, or while the box is held, are there then.
    A loop that has ended is called no more.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self._calls: deque[tuple[Callable[[Any], None], Any]] = deque()
        self._is_on_its_way = False
        self._is_held = False

    def put(self, call: Callable[[Any], None], value: object) -> None:
        """Have `call(value)` made on the loop soon; from any thread."""
        self._calls.append((call, value))
        if not self._is_held:
            self._wake()

    def hold(self) -> None:
        """Let calls wait for `release`."""
        self._is_held = True

    def release(self) -> None:
        self._is_held = False  # before the look: a call put meanwhile is seen, or wakes the loop
        if self._calls:
            self._wake()

    def _wake(self) -> None:
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
        self._lock = threading.Lock()

    def here(self) -> Outbox:
        """That of the running loop."""
        loop = asyncio.get_running_loop()
        with self._lock:
            if loop not in self._boxes:
                self._boxes[loop] = Outbox(loop)
            return self._boxes[loop]

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What is put meanwhile, by any thread, arrives together at the end.

        A loop that was woken by the first would take the interpreter from who puts the others.
        """
        with self._lock:
            boxes = list(self._boxes.values())
        for box in boxes:
            box.hold()
        try:
            yield
        finally:
            for box in boxes:
                box.release()
