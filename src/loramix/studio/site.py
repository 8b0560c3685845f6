"""Where the chat page is in the server's app, and who gets to see it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import nicegui
from fastapi import FastAPI, Form
from nicegui import ui
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Match, Mount
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loramix.errors import LoramixError, NotKnown, ServeError
from loramix.serve.access import has_keys, is_page, require_neighbour, require_same_site
from loramix.serve.failures import on_loramix_error
from loramix.serve.service import Service
from loramix.studio.answers import Answers
from loramix.studio.client import Api
from loramix.studio.page import open_page

COOKIE = "loramix_key"
RECONNECT_S = 10.0  # a page that was away for less goes on where it was
SIGN_IN = Path(__file__).with_name("sign_in.html")
HEADERS = {
    "content-security-policy": (
        "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
        "style-src 'self' 'unsafe-inline'; img-src 'self' data:; font-src 'self' data:; "
        "connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
    ),
    "referrer-policy": "same-origin",
    "x-content-type-options": "nosniff",
}


def with_page(app: FastAPI) -> None:
    """Put the chat page at `/` of a server's app; ServeError for a second: NiceGUI knows one."""
    if nicegui.app.config.has_run_config:
        raise ServeError("This process has a chat page already; serve the second without one.")
    service: Service = app.state.service
    answers = Answers()

    async def home(request: Request) -> Response | None:
        api = Api(app, request, request.cookies.get(COOKIE, ""))
        try:
            await open_page(api, answers, request)
        except NotKnown:
            return _sign_in("That key is not known." if api.has_key else "")
        except ServeError as error:
            return PlainTextResponse(str(error), error.status)
        return None

    ui.page("/", title="loramix", favicon=_icon(), response_timeout=30)(home)
    ui.run_with(  # an app of its own: in ours it would take every path
        FastAPI(),
        title="loramix",
        dark=None,
        tailwind=False,
        binding_refresh_interval=None,
        reconnect_timeout=RECONNECT_S,
        show_welcome_message=False,
    )
    app.router.routes.append(Pages("/", Guard(nicegui.app, service)))
    _add_doors(app)
    _live_with(app, answers)


class Pages(Mount):
    """NiceGUI's app where its paths are; every other path stays the API's, with its errors."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        return super().matches(scope) if is_page(scope["path"]) else (Match.NONE, {})


class Guard:
    """Wraps the pages: what they are for a browser, no page of another site may use.

    Without keys the rule of the API holds, for sockets too: this machine, by its own name.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            require_same_site(Headers(scope=scope), self._service.cors)
            if not await has_keys(self._service):
                require_neighbour(scope, self._service)
        except LoramixError as error:
            await self._refuse(error, scope, receive, send)
            return

        async def sealed(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await self._app(scope, receive, sealed)

    async def _refuse(
        self, error: LoramixError, scope: Scope, receive: Receive, send: Send
    ) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": str(error)[:120]})
            return
        response = await on_loramix_error(Request(scope), error)
        await response(scope, receive, send)


def _add_doors(app: FastAPI) -> None:
    """Signing in: the key is kept in a cookie that no script reads and no other site sends."""

    @app.post("/sign-in", include_in_schema=False)
    async def sign_in(request: Request, key: Annotated[str, Form()] = "") -> Response:
        require_same_site(request.headers, app.state.service.cors)
        try:
            await Api(app, request, key.strip()).ask("GET", "/v1/models")
        except NotKnown:
            return _sign_in("That key is not known." if key.strip() else "A key is needed.")
        response = RedirectResponse("/", 303)
        is_secure = request.url.scheme == "https"
        kept = quote(key.strip())  # as it is, for whatever is a key
        response.set_cookie(COOKIE, kept, httponly=True, samesite="strict", secure=is_secure)
        return response

    @app.post("/sign-out", include_in_schema=False)
    async def sign_out(request: Request) -> Response:
        require_same_site(request.headers, app.state.service.cors)
        response = RedirectResponse("/", 303)
        response.delete_cookie(COOKIE)
        return response


def _sign_in(problem: str) -> Response:
    text = SIGN_IN.read_text("utf-8").replace("{problem}", problem)
    return HTMLResponse(text, 401 if problem else 200, HEADERS)


def _live_with(app: FastAPI, answers: Answers) -> None:
    """NiceGUI begins and ends with the app; before its end, answers that pages wait for do."""
    inner: Any = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[Any]:
        async with inner(app) as state, nicegui.app.router.lifespan_context(nicegui.app):
            yield state
            await answers.ended()

    app.router.lifespan_context = lifespan


def _icon() -> str:
    return (SIGN_IN.parent / "icon.svg").read_text("utf-8")
