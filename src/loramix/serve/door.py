"""The way in and out: every request gets a trace id, a limit of bytes, a count and a log line."""

from __future__ import annotations

import logging
import re
import secrets

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loramix.errors import Ending
from loramix.serve.failures import Plain, body, failure
from loramix.serve.service import Service, Trip

log = logging.getLogger("loramix.serve")

ADAPTERS = re.compile(r"/v1/adapters/[^/]+/files")
DATASETS = re.compile(r"/v1/datasets/[^/]+/file")
_TRACE = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Door:
    """Wraps the app; plain ASGI, so that nothing stands between a stream and its client."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        trip = Trip(_trace(Headers(scope=scope)))
        scope.setdefault("state", {})["trip"] = trip
        status = 500  # unless a response begins

        async def passing(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = trip.trace
            await send(message)

        try:
            await self._enter(scope, receive, passing)
        finally:
            self._note(scope, trip, status)

    async def _enter(self, scope: Scope, receive: Receive, send: Send) -> None:
        limit = self._limit(scope["path"])
        declared = Headers(scope=scope).get("content-length", "0")
        if self._service.live.is_ending and scope["path"] not in ("/health", "/ready"):
            await Plain(failure(Ending()), 503)(scope, receive, send)
        elif declared.isdigit() and int(declared) > limit:
            await Plain(body(413, _too_large(limit)), 413)(scope, receive, send)
        else:
            await self._app(scope, _counted(receive, limit), send)

    def _limit(self, path: str) -> int:
        limits = self._service.limits
        if DATASETS.fullmatch(path):
            return limits.dataset_bytes
        return limits.upload_bytes if ADAPTERS.fullmatch(path) else limits.body_bytes

    def _note(self, scope: Scope, trip: Trip, status: int) -> None:
        route = getattr(scope.get("route"), "path", "unknown")
        self._service.meter.requests.labels(route, str(status)).inc()
        facts = {
            "trace": trip.trace,
            "method": scope["method"],
            "path": scope["path"],
            "status": status,
            "ms": round(trip.age_s * 1000, 2),
            **trip.facts,
        }
        is_dull = route in ("/health", "/ready", "/metrics") or "/_nicegui" in scope["path"]
        log.log(logging.DEBUG if is_dull else logging.INFO, "request", extra={"facts": facts})


def _counted(receive: Receive, limit: int) -> Receive:
    """Reads on until a body is larger than it may be."""
    num_bytes = 0

    async def read() -> Message:
        nonlocal num_bytes
        message = await receive()
        num_bytes += len(message.get("body", b""))
        if num_bytes > limit:
            raise HTTPException(413, _too_large(limit))
        return message

    return read


def _too_large(limit: int) -> str:
    return f"The body is too large; expected {limit:,} bytes at most."


def _trace(headers: Headers) -> str:
    """The id that the client gave its request, if it can be one, or a new one."""
    given = headers.get("x-request-id", "")
    return given if _TRACE.fullmatch(given) else secrets.token_hex(8)
