"""The server: its routes, its errors, its beginning and its end."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from types import ModuleType

import uvicorn
from fastapi import Depends, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from loramix.errors import LoramixError
from loramix.serve import adapters, conversations, metrics, openai, routing, runs, workflows
from loramix.serve.access import Access
from loramix.serve.door import Door
from loramix.serve.failures import (
    FAILURES,
    on_bug,
    on_http_error,
    on_invalid,
    on_loramix_error,
)
from loramix.serve.relearning import keep_learned
from loramix.serve.service import Service
from loramix.serve.wire import require_known_query

WORKERS = 64  # threads: some wait for adapters to be read, and keys are looked up meanwhile


def create_app(service: Service) -> FastAPI:
    """The service behind HTTP. The service is the caller's to close."""
    app = FastAPI(
        title="loramix",
        version=version("loramix"),
        description="One frozen base language model, many LoRA adapters, a mix for each request.",
        responses=FAILURES,
        dependencies=[Depends(HTTPBearer(auto_error=False, description="An API key."))],
    )
    app.state.service = service
    for part in (openai, adapters, routing, conversations, workflows, *_training()):
        app.include_router(part.router, dependencies=[Depends(require_known_query)])
    app.include_router(metrics.router)
    app.add_middleware(Access, service=service)
    if service.cors:
        app.add_middleware(
            CORSMiddleware, allow_origins=service.cors, allow_methods=["*"], allow_headers=["*"]
        )
    app.add_middleware(Door, service=service)
    app.add_exception_handler(LoramixError, on_loramix_error)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(Exception, on_bug)
    return app


def _training() -> tuple[ModuleType, ...]:
    """Jobs are processes that hold locks, which Windows has none of that would do."""
    if os.name == "nt":
        return ()
    from loramix.serve import datasets, jobs

    return datasets, jobs


class Server(uvicorn.Server):
    """Ends in two steps: answers under way may go on for a while, then each gets a last event."""

    def __init__(self, service: Service, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._service = service
        self._watching: list[asyncio.Task[None]] = []
        self._expiring: asyncio.Task[None] | None = None

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM end the server; the process goes on, it has ended well."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        ends = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in ends}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        workers = ThreadPoolExecutor(WORKERS, "loramix-serve")
        asyncio.get_running_loop().set_default_executor(workers)
        await asyncio.to_thread(runs.abandon, self._service)
        await super().startup(sockets)
        self._expiring = asyncio.create_task(runs.expire(self._service))
        if self._service.training:
            from loramix.serve.following import watch

            watches = (watch(self._service), keep_learned(self._service))
            self._watching = [asyncio.create_task(each) for each in watches]

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._service.live.is_ending = True
        ending = asyncio.create_task(self._end())
        await super().shutdown(sockets)
        await runs.ended(self._service)
        if self._expiring:
            self._expiring.cancel()
        await asyncio.gather(*self._watching, return_exceptions=True)
        ending.cancel()

    async def _end(self) -> None:
        await asyncio.sleep(self._service.limits.shutdown_s)
        await asyncio.to_thread(self._service.lm.close)


def server(
    service: Service, host: str = "127.0.0.1", port: int = 8000, *, app: FastAPI | None = None
) -> Server:
    """A server that is not started; `run` does that and blocks until it is told to end.

    `app` is the service's own, if it has been made already, as to put a page into it.
    """
    config = uvicorn.Config(
        app or create_app(service),
        host=host,
        port=port,
        lifespan="on",  # "auto" would take a failure there for an app that has none
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(service.limits.shutdown_s) + 5,
    )
    return Server(service, config)
