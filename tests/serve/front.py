"""A real server on a free port, for as long as a block lasts: in a thread, or in a process."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx
from fastapi import FastAPI

from loramix.serve.app import Server, server
from loramix.serve.service import Service


@dataclass(frozen=True)
class Front:
    """A running server and a client of it."""

    service: Service
    server: Server
    http: httpx.Client
    url: str

    def post(self, path: str, **body: object) -> httpx.Response:
        return self.http.post(path, json=body)

    def chat(self, text: str = "hi", **body: object) -> httpx.Response:
        messages = [{"role": "user", "content": text}]
        defaults = {"messages": messages, "model": "base", "temperature": 0, "max_tokens": 8}
        return self.post("/v1/chat/completions", **(defaults | body))

    def complete(self, prompt: object = "the cat", **body: object) -> httpx.Response:
        defaults = {"prompt": prompt, "model": "base", "temperature": 0, "max_tokens": 8}
        return self.post("/v1/completions", **(defaults | body))


@contextmanager
def running(service: Service, app: FastAPI | None = None) -> Iterator[Front]:
    made = server(service, port=0, app=app)
    thread = threading.Thread(target=made.run, daemon=True)
    thread.start()
    wait_for(lambda: made.started or not thread.is_alive())
    port = made.servers[0].sockets[0].getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with httpx.Client(base_url=url, timeout=60) as http:
        try:
            yield Front(service, made, http, url)
        finally:
            made.should_exit = True
            http.close()
            thread.join(timeout=30)
            assert not thread.is_alive()


def wait_for(true: object, seconds: float = 20) -> None:
    assert callable(true)
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.005)


@contextmanager
def served(*words: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`loramix serve` with these words, and its address."""
    command = [sys.executable, "-m", "loramix", "serve", "--port", "0", *words]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            assert "at http://127.0.0.1:" in line, (log.seek(0), log.read())
            yield process, line.split()[-1]
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
