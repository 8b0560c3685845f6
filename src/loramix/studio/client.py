"""The server's own HTTP API, asked from within the process on behalf of an open page."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any
from urllib.parse import quote

import httpx2
from starlette.requests import Request
from starlette.types import ASGIApp, Message

from loramix.errors import NotKnown, ServeError


class Api:
    """What a browser could ask of the server itself: its address, its Host, its key.

    Raises NotKnown where a key is needed, ServeError with the server's own words for every other
    refusal.
    """

    def __init__(self, app: ASGIApp, page: Request, key: str = "") -> None:
        headers = {"host": page.headers.get("host", "localhost")}
        if key:
            headers["authorization"] = (
                f"Bearer {quote(key)}"  # no key has a letter that this alters
            )
        self.has_key = bool(key)
        client = (page.client.host, page.client.port) if page.client else None
        self._http = httpx2.AsyncClient(
            transport=InProcess(app, client),
            base_url="http://localhost",
            headers=headers,
            timeout=None,
            trust_env=False,
        )

    async def ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The JSON of a response."""
        response = await self._http.request(method, path, json=body)
        self._check(response)
        return response.json()

    async def events(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any]]:
        """The events of a stream; closing it early is what a client does that leaves."""
        asked = {**body, "stream": True}
        async with self._http.stream("POST", path, json=asked) as response:
            if response.is_error:
                await response.aread()
                self._check(response)
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        raise ServeError(event["error"]["message"])
                    yield event

    def _check(self, response: httpx2.Response) -> None:
        if response.status_code == 401:
            raise NotKnown(self.has_key)
        if response.is_error:
            refusal = ServeError(response.json()["error"]["message"])
            refusal.status = response.status_code
            raise refusal


class InProcess(httpx2.AsyncBaseTransport):
    """Runs an ASGI app for each request. Its response is read while it is made."""

    def __init__(self, app: ASGIApp, client: tuple[str, int] | None) -> None:
        self._app = app
        self._client = client

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": request.method,
            "scheme": request.url.scheme,
            "path": request.url.path,
            "raw_path": request.url.raw_path.split(b"?")[0],
            "query_string": request.url.query,
            "root_path": "",
            "headers": [(name.lower(), value) for name, value in request.headers.raw],
            "server": (request.url.host, request.url.port or 80),
            "client": self._client,
            "state": {},
        }
        exchange = Exchange(await request.aread())
        start = await exchange.begin(self._app, scope)
        return httpx2.Response(start["status"], headers=start["headers"], stream=exchange)


class Exchange(httpx2.AsyncByteStream):
    """One request and its response; closed before its end, it is a client that has left."""

    def __init__(self, body: bytes) -> None:
        self._body: bytes | None = body
        self._sent: asyncio.Queue[Message | None] = asyncio.Queue()  # None once the app returns
        self._left = asyncio.Event()

    async def begin(self, app: ASGIApp, scope: dict[str, Any]) -> Message:
        """The start of the response; what the app raises before it."""
        self._task = asyncio.create_task(_run(app(scope, self._receive, self._sent.put)))
        self._task.add_done_callback(lambda _: self._sent.put_nowait(None))
        try:
            start = await self._sent.get()
        except asyncio.CancelledError:
            await self.aclose()
            raise
        if start is None:
            self._task.result()
            raise ServeError("The server gave no answer; its log may say why.")
        return start

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while message := await self._sent.get():
            yield message.get("body", b"")
            if not message.get("more_body", False):
                return

    async def aclose(self) -> None:
        self._left.set()
        await asyncio.wait([self._task])
        if not self._task.cancelled():
            self._task.exception()  # the app's own handler has answered and logged it

    async def _receive(self) -> Message:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._left.wait()
        return {"type": "http.disconnect"}


async def _run(call: Any) -> None:
    await call
