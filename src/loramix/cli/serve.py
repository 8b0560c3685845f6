"""`loramix serve`, `validate`, `run`, `logs`: the server, its settings, and what it did."""

from __future__ import annotations

import ipaddress
import json
import os
import socket
import time
from collections.abc import Sequence
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from loramix.cli.asking import answer, ask_server
from loramix.errors import ServeError, SettingsError

if TYPE_CHECKING:
    from loramix.serve.app import Server
    from loramix.serve.service import Service
    from loramix.serve.settings import Settings

DEFAULT = Path("loramix.yaml")
Files = Annotated[
    list[Path] | None,
    Option("--file", "-f", help="Settings; later files win. Default: ./loramix.yaml, if there."),
]
Assignments = Annotated[
    list[str] | None, Option("--set", metavar="A.B=VALUE", help="One setting; repeatable.")
]
Body = Annotated[
    str, Option("--input", metavar="JSON", help='{"prompt": ...} or {"messages": ...}')
]


def serve(
    file: Files = None,
    assignments: Assignments = None,
    host: Annotated[str | None, Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, Option(help="0 is any that is free.")] = None,
    base: Annotated[str | None, Option(help="Folder, hub id, or pocket.")] = None,
    library: Annotated[Path | None, Option(help="Folder of adapters.")] = None,
    insecure: Annotated[bool, Option(help="Let other machines in without keys.")] = False,
) -> None:
    """Serve base, library and router over HTTP until told to end."""
    flags = {"host": host, "port": port, "base": base, "library": library and str(library)}
    given = [f"{name}={json.dumps(value)}" for name, value in flags.items() if value is not None]
    settings = _settings(file, [*(assignments or ()), *given])
    if not insecure:
        _require_loopback(settings)
    with listening(settings.host, settings.port) as door:
        from loramix.serve.logs import log_to

        service = opened_service(settings, insecure=insecure)
        with closing(service):
            log_to(Path(settings.log_file) if settings.log_file else None)
            made, url = made_for(door, service, page=settings.page)
            typer.echo(f"loramix serves {service.lm.engine.base_id} at {url}")
            made.run(sockets=[door])


def made_for(door: socket.socket, service: Service, *, page: bool) -> tuple[Server, str]:
    """The server of a socket, and its address; with the chat page where that is installed."""
    from loramix.serve.app import create_app, server

    app = create_app(service)
    if page and find_spec("nicegui"):
        from loramix.studio.site import with_page

        with_page(app)
    elif page:
        typer.echo("No chat page: install it with `pip install 'loramix[studio]'`.", err=True)
    host, port = door.getsockname()[:2]
    place = f"[{host}]" if ":" in host else host
    return server(service, host, port, app=app), f"http://{place}:{port}"


def validate(file: Files = None, assignments: Assignments = None) -> None:
    """Check settings and what they name, without loading weights."""
    from loramix.serve.opening import problems

    settings = _settings(file, assignments)
    if found := problems(settings):
        raise SettingsError(" ".join(found))
    adapters = ", ".join(adapter.name for adapter in settings.all_adapters) or "none named"
    typer.echo(
        f"Good: base {settings.model.model}, library {settings.shelf.folder}, adapters: {adapters}."
    )


def run_one(
    body: Body,
    url: Annotated[
        str | None, Option(help="A running server, as http://127.0.0.1:8000; else in process.")
    ] = None,
    file: Files = None,
    assignments: Assignments = None,
    as_json: Annotated[bool, Option("--json", help="Print the whole response.")] = False,
) -> None:
    """Answer one request, given as JSON, and print the answer."""
    request = _request(body)
    if url is None:
        said = _in_process(_settings(file, assignments), request)
    elif file or assignments:
        raise SettingsError("--url asks a running server, which has its settings; leave -f out.")
    else:
        said = over_http(url, request)
    if as_json:
        typer.echo(json.dumps(said, ensure_ascii=False))
        return
    for choice in said["choices"]:
        typer.echo(_shown(choice["message"]))


def logs(
    file: Annotated[Path, Argument(help="What the setting log_file names.")],
    follow: Annotated[bool, Option("--follow", "-f", help="Go on as lines come.")] = False,
    trace: Annotated[str | None, Option(help="Only of the request with this id.")] = None,
    lines: Annotated[int, Option("--lines", "-n", min=1, help="How many, from the end.")] = 50,
) -> None:
    """Show what a server logged, a line each."""
    with file.open(encoding="utf-8") as log:
        shown = [line for line in log if _is_of(line, trace)]
        for line in shown[-lines:]:
            typer.echo(_readable(line))
        while follow:
            if not (line := log.readline()):
                time.sleep(0.2)
            elif _is_of(line, trace):
                typer.echo(_readable(line))


def _settings(files: Sequence[Path] | None, assignments: Sequence[str] | None) -> Settings:
    from loramix.serve.settings import load

    return load(files or ([DEFAULT] if DEFAULT.exists() else []), assignments or ())


def opened_service(settings: Settings, *, insecure: bool = False) -> Any:
    from loramix.cli.opening import hush, import_quickly, no_collection, notice
    from loramix.serve.opening import open_service

    hush(bars=False)
    with notice(f"Opening {settings.model.model} ..."), no_collection():
        import_quickly()
        return open_service(settings, insecure=insecure)


def _require_loopback(settings: Settings) -> None:
    """ServeError if other machines were let in and no keys asked for."""
    from loramix.folders import own_database
    from loramix.store import Store

    host = settings.host
    try:
        is_loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_loopback = False
    if is_loopback or settings.keys:
        return
    with Store.open(settings.database or own_database()) as store:
        if store.keys.is_empty():
            raise ServeError(
                f"{host} lets other machines in, and there are no keys to ask for; make one with "
                f"`loramix keys add`, use 127.0.0.1, or say --insecure."
            )


def listening(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise ServeError(
            f"Cannot listen on {host}:{port}: {os.strerror(error.errno or 0)}; choose another "
            f"--port (0 is any that is free) or --host."
        ) from error


def _request(body: str) -> dict[str, Any]:
    """The body of a chat completion; a prompt becomes the user's message."""
    try:
        request = json.loads(body)
    except ValueError as error:
        raise SettingsError(f"--input is not JSON: {error}.") from error
    if not isinstance(request, dict) or len({"prompt", "messages"} & request.keys()) != 1:
        raise SettingsError('--input must be an object with either "prompt" or "messages".')
    if "prompt" in request:
        request["messages"] = [{"role": "user", "content": request.pop("prompt")}]
    if request.get("stream"):
        raise SettingsError("--input asks for a stream; the answer is printed whole: leave it out.")
    return request


def _in_process(settings: Settings, request: dict[str, Any]) -> dict[str, Any]:
    import asyncio

    import httpx2

    from loramix.serve.app import create_app

    service = opened_service(settings)

    async def ask() -> httpx2.Response:
        transport = httpx2.ASGITransport(create_app(service))
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.post("/v1/chat/completions", json=request, timeout=None)

    with closing(service):
        return answer(asyncio.run(ask()))


def over_http(url: str, request: dict[str, Any]) -> dict[str, Any]:
    return ask_server(url, "POST", "/v1/chat/completions", request)


def _shown(message: dict[str, Any]) -> str:
    calls = message.get("tool_calls")
    return message["content"] or (json.dumps(calls) if calls else "")


def _is_of(line: str, trace: str | None) -> bool:
    return trace is None or _facts(line).get("trace") == trace


def _readable(line: str) -> str:
    facts = _facts(line)
    if not facts:
        return line.rstrip("\n")
    head = " ".join(str(facts.pop(name, "")) for name in ("time", "level", "message"))
    return " ".join([head, *(f"{name}={value}" for name, value in facts.items())])


def _facts(line: str) -> dict[str, Any]:
    try:
        facts = json.loads(line)
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}
