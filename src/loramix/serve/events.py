"""Server-sent events, and work that ends when its client has left."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager, aclosing, nullcontext
from typing import Any, TypeVar

from fastapi import Response
from starlette.types import Receive, Scope, Send

from loramix.errors import LoramixError
from loramix.serve.answering import in_time
from loramix.serve.failures import failure
from loramix.serve.service import Service, Trip

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"
_JSON = json.JSONEncoder(separators=(",", ":"))  # made once: making one costs as much as using it


def event(data: Mapping[str, Any]) -> bytes:
    return b"data: %b\n\n" % _JSON.encode(data).encode()


class EventStream(Response):
    """Events as they come. The first decides: if it is an error, that is the whole response.

    A later error is a last event of the same shape. When the client leaves, the events are closed
    at once, which frees what works for them.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        service: Service,
        trip: Trip,
        events: AsyncGenerator[bytes],
        headers: Mapping[str, str],
        *,
        is_endless: bool = False,  # not an answer: no request's time holds for it
    ) -> None:
        super().__init__(headers={**headers, "cache-control": "no-cache"})
        del self.headers["content-length"]
        self._service = service
        self._trip = trip
        self._events = events
        self._is_endless = is_endless

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await while_connected(receive, self._write(send))

    async def _write(self, send: Send) -> None:
        begun = False
        try:
            async with self._in_time(), aclosing(self._events) as events:
                async for data in events:
                    if not begun:
                        begun = True
                        await send(self._start())
                    await send({"type": "http.response.body", "body": data, "more_body": True})
        except LoramixError as error:
            if not begun:
                raise
            self._trip.facts["error"] = str(error)
            last = event(failure(error)) + DONE
            await send({"type": "http.response.body", "body": last, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _in_time(self) -> AbstractAsyncContextManager[Any]:
        return nullcontext() if self._is_endless else in_time(self._service, self._trip)

    def _start(self) -> dict[str, Any]:
        return {
            "type": "http.response.start",
            "status": self.status_code,
            "headers": self.raw_headers,
        }


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """What the work comes to; None if the client left first, which cancels it."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
