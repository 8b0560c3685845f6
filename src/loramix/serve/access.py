"""Who asks: the API key of a request, what it may use, and how much of that in a minute.

Until the store holds a key, whoever reaches us over loopback is an admin (pages of other sites in
a browser here are not), and nobody else is let in unless the server was told to be `insecure`.
From the first key on everybody needs one.
"""

from __future__ import annotations

import asyncio
import ipaddress
import math
import time
from collections.abc import Callable, Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from loramix.errors import LoramixError, NotAllowed, NotKnown, TooMany
from loramix.serve.failures import on_loramix_error
from loramix.serve.service import Caller, Service
from loramix.store.records import Key

PUBLIC = ("/health", "/ready", "/docs", "/openapi.json")
DOORS = ("/sign-in", "/sign-out")  # of the chat page, which asks for a key itself


class Access:
    """Wraps the app: a request that is not let in is answered before its body is read."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service
        self._rates = Rates()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _is_public(scope["path"]):
            await self._app(scope, receive, send)
            return
        try:
            key = await self._key(scope)
            if key is not None:
                self._rates.enter(key)
        except LoramixError as error:
            response = await on_loramix_error(Request(scope), error)
            await response(scope, receive, send)
            return
        scope["state"]["caller"] = Caller() if key is None else _caller(key)
        try:
            await self._app(scope, receive, send)
        finally:
            if key is not None:
                self._spend(key, scope)

    def _spend(self, key: Key, scope: Scope) -> None:
        """Count the tokens, now or when the work that the request left behind has ended."""

        def count(_: object = None) -> None:
            self._rates.spend(key, _num_tokens(scope))

        if work := scope["state"]["trip"].work:
            work[-1].add_done_callback(count)
        else:
            count()

    async def _key(self, scope: Scope) -> Key | None:
        """The key of a request; None for whoever needs none. NotKnown for everybody else."""
        kind, _, secret = Headers(scope=scope).get("authorization", "").partition(" ")
        given = secret.strip() if kind.lower() == "bearer" else ""
        store = self._service.store
        key = await asyncio.to_thread(store.keys.find, given) if store and given else None
        if key is None and await has_keys(self._service):
            raise NotKnown(bool(given))
        if key is None:
            require_neighbour(scope, self._service)
        return key


class Rates:
    """A bucket of requests and one of tokens for each key; both fill up within a minute.

    Tokens are counted when an answer has ended, so one answer may overdraw its bucket; the next
    waits until that is paid back. Every server counts for itself.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._levels: dict[tuple[str, str], tuple[float, float]] = {}  # and when it was so

    def enter(self, key: Key) -> None:
        """Take a request from the bucket; TooMany, and when to come back, if one is empty."""
        requests, tokens = key.requests_per_minute, key.tokens_per_minute
        if requests is not None and (lacking := 1 - self._level(key, "requests", requests)) > 0:
            raise TooMany(f"{requests} requests", math.ceil(lacking * 60 / requests))
        if tokens is not None and (level := self._level(key, "tokens", tokens)) <= 0:
            raise TooMany(f"{tokens} tokens", math.ceil((1 - level) * 60 / tokens))
        if requests is not None:
            self._take(key, "requests", requests, 1)

    def spend(self, key: Key, num_tokens: int) -> None:
        if key.tokens_per_minute is not None:
            self._take(key, "tokens", key.tokens_per_minute, num_tokens)

    def _level(self, key: Key, kind: str, limit: int) -> float:
        level, then = self._levels.get((key.id, kind), (limit, self._clock()))
        return min(limit, level + (self._clock() - then) * limit / 60)

    def _take(self, key: Key, kind: str, limit: int, amount: int) -> None:
        self._levels[key.id, kind] = self._level(key, kind, limit) - amount, self._clock()


async def has_keys(service: Service) -> bool:
    """Whether everybody needs a key by now."""
    store = service.store
    return store is not None and not await asyncio.to_thread(store.keys.is_empty)


def is_page(path: str) -> bool:
    """Whether this is of the chat page, which a browser has to get before it can show a key."""
    return path in ("/", "/favicon.ico") or path.startswith("/_nicegui")


def _is_public(path: str) -> bool:
    return path in (*PUBLIC, *DOORS) or is_page(path)


def require_neighbour(scope: Scope, service: Service) -> None:
    """While there are no keys: NotKnown, NotAllowed for what does not come from this machine."""
    if service.insecure:
        return
    if not _is_near(scope):
        raise NotKnown(False)
    _require_own_page(Headers(scope=scope), service.cors)


def require_same_site(headers: Headers, origins: Sequence[str]) -> None:
    """NotAllowed for what another site's page has a browser ask for with our own page's cookie."""
    origin = headers.get("origin")
    if origin and origin not in origins and urlsplit(origin).netloc != headers.get("host"):
        raise NotAllowed(f"This was asked for a page of {origin[:80]}; open the chat page itself.")


def _caller(key: Key) -> Caller:
    allowed = None if key.adapters is None else frozenset(key.adapters)
    return Caller(key.name, key.role == "admin", allowed, owner=key.id)


def _is_near(scope: Scope) -> bool:
    """Whether the other end of the connection is on this machine; a socket file is, too."""
    client = scope.get("client")
    return client is None or ipaddress.ip_address(client[0]).is_loopback


def _require_own_page(headers: Headers, origins: Sequence[str]) -> None:
    """NotAllowed for what a page of another site has a browser on this machine ask.

    A browser sends forms to loopback for any page, and says whose it is in `Origin`; a page whose
    name was made to point to loopback (DNS rebinding) is known by its name in `Host`.
    """
    host, origin = headers.get("host", "localhost"), headers.get("origin", "http://localhost")
    if not _is_loopback(host) or not (origin in origins or _is_loopback(origin)):
        foreign = host if _is_loopback(origin) else origin
        raise NotAllowed(
            f"This was asked for a page of {foreign[:80]}, which is not among the cors "
            f"origins; add it there, or make a key with `loramix keys add`."
        )


def _is_loopback(place: str) -> bool:
    """Whether an origin, or a host with or without a port, is this machine by name or number."""
    name = urlsplit(place if "//" in place else f"//{place}").hostname or ""
    try:
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _num_tokens(scope: Scope) -> int:
    facts = scope["state"]["trip"].facts
    return int(facts.get("prompt_tokens", 0) + facts.get("completion_tokens", 0))
