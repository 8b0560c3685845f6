"""What every route works with, handed to the app once: no route reads a global."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from time import perf_counter, time
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Depends, Request

from loramix.errors import AdapterError, EngineError, NotAllowed, ServeError, UnknownAdapter
from loramix.lm import LM, ROUTER, has_router, load_router
from loramix.mix import Mix
from loramix.route.change import changing
from loramix.route.feedback import CorrectedRouter
from loramix.route.gate import GateRouter
from loramix.route.saved import state
from loramix.serve.limits import Limits
from loramix.serve.meter import Meter

if TYPE_CHECKING:
    from loramix.adapter import Card
    from loramix.library import Library
    from loramix.route import Router
    from loramix.serve.training import Training
    from loramix.store import Store


REMEMBERED = 1000  # routed texts


@dataclass(slots=True)
class Live:
    """What changes while the server runs."""

    default: str = ""  # the mix of requests that name none; "" is auto with a router, else base
    numbered: list[str] = field(default_factory=list)  # adapters by the number clients know them by
    hidden: set[str] = field(default_factory=set)  # adapters that were unloaded, not deleted
    routed: dict[str, str] = field(default_factory=dict)  # the latest texts by trace id
    is_ending: bool = False
    beginning: Lock = field(default_factory=Lock)  # of jobs: one after the other
    learning: Lock = field(default_factory=Lock)  # the router: one change after the other
    router: tuple[int, int] = (0, 0)  # the state in which it was read or saved
    writes: set[asyncio.Task[Any]] = field(default_factory=set)  # of answers that were stopped
    runs: dict[str, asyncio.Task[Any]] = field(default_factory=dict)  # workflow tasks at work here
    started: int = field(default_factory=lambda: int(time()))

    def remember(self, trace: str, text: str) -> None:
        """Keep what was routed, in memory only, so that a correction can name its trace id."""
        self.routed.pop(trace, None)
        self.routed[trace] = text
        if len(self.routed) > REMEMBERED:
            del self.routed[next(iter(self.routed))]


@dataclass(frozen=True, slots=True)
class Service:
    """A model, where its conversations and keys are kept, and how it is to be served.

    A module of `serve` has `router = APIRouter()`; its handlers take `service: Serving`,
    `caller: Asking` and `trip: Way`.
    """

    lm: LM
    store: Store | None = None  # where conversations and keys are; None keeps nothing
    limits: Limits = Limits()
    roots: tuple[Path, ...] = ()  # folders from which adapters may be loaded by path
    training: Training | None = None  # None: this server does not train
    reopened: Callable[[Library], Router] = load_router  # the fitted router, after a refit
    log_prompts: bool = False
    insecure: bool = False  # other machines are let in even without keys
    cors: tuple[str, ...] = ()  # origins whose pages may call
    system_prompts: Mapping[str, str] = field(default_factory=dict)  # instead of those on cards
    meter: Meter = field(default_factory=Meter)
    live: Live = field(default_factory=Live)

    def close(self) -> None:
        """Stop the engine and let go of the database."""
        self.lm.close()
        if self.store is not None:
            self.store.close()

    @property
    def kept(self) -> Store:
        """The store; ServeError if there is none."""
        if self.store is None:
            raise ServeError("This server keeps nothing; start it with a database.")
        return self.store

    @property
    def trains(self) -> Training:
        """Where it trains; ServeError if it does not."""
        if self.training is None:
            raise ServeError("This server does not train; start it with `loramix serve`.")
        return self.training

    def reload_router(self) -> None:
        """Route by the library's router as it is now, unless the settings have another."""
        if self.training and self.training.refits and has_router(self.lm.library):
            with self.live.learning:
                if state(self._routed_by) != self.live.router:
                    self._reopen()

    def learn(self, card: Card, queries: Sequence[str]) -> None:
        """Route to an adapter from now on: by queries of it, else by its card.

        Nothing happens where the settings have another router, or there is none.
        """
        self._change(lambda gate: gate.meet(card, queries))

    def unlearn(self, name: str) -> None:
        """Route to an adapter no more, unless it is the only one."""
        self._change(lambda gate: gate.remove(name) if {name} < {*gate.adapters} else None)

    def _change(self, change: Callable[[GateRouter], GateRouter | None]) -> None:
        """Change the library's router on the disk, where the settings' own are not in it."""
        with self.live.learning:
            known = self.lm.router
            if not isinstance(known, CorrectedRouter) or not has_router(self.lm.library):
                return
            encoder = known.gate.encoder or known.gate.ngrams
            with changing(self._routed_by):
                grown = change(GateRouter.load(self._routed_by, encoder=encoder))
                if grown:
                    grown.save(self._routed_by)
            if grown:
                self._reopen()

    @property
    def _routed_by(self) -> Path:
        return self.lm.library.folder / ROUTER

    def _reopen(self) -> None:
        self.live.router = state(self._routed_by)
        self.lm.router = self.reopened(self.lm.library)

    @property
    def default_mix(self) -> str:
        return self.live.default or ("base" if self.lm.router is None else "auto")

    def prompt_of(self, name: str) -> str:
        """An adapter's system prompt: what the settings say, else its card."""
        if (said := self.system_prompts.get(name)) is not None:
            return said
        try:
            return self.lm.library.system_prompt(name)
        except AdapterError as error:  # its card is damaged: no fault of the request
            raise EngineError(str(error)) from error

    def has(self, name: str) -> bool:
        """Whether an adapter is on offer."""
        return name not in self.live.hidden and name in self.lm.library

    def names(self) -> list[str]:
        """The adapters on offer."""
        return [name for name in self.lm.library.names() if name not in self.live.hidden]

    def numbers(self) -> dict[int, str]:
        """The adapters on offer by number; one keeps its number while the server runs."""
        known, numbered = self.names(), self.live.numbered
        numbered += [name for name in known if name not in numbered]
        return {number: name for number, name in enumerate(numbered) if name in known}


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, and what they may."""

    name: str = ""  # of the key
    is_admin: bool = True
    adapters: frozenset[str] | None = None  # those that may be used; None is all
    owner: str = ""  # the key's id: what it makes is its own

    @property
    def owners(self) -> tuple[str, ...]:
        """Whose conversations these are; an admin also has those from before there were keys."""
        return (self.owner, "") if self.is_admin else (self.owner,)

    def names(self, service: Service) -> list[str]:
        """The adapters on offer to this caller."""
        return [n for n in service.names() if self.adapters is None or n in self.adapters]

    def require(self, mix: Mix, service: Service) -> None:
        """UnknownAdapter for what is not there, and for what this caller need not know of."""
        for name in mix:
            if not (service.has(name) and (self.adapters is None or name in self.adapters)):
                raise UnknownAdapter(name, self.names(service))

    def require_admin(self) -> None:
        if not self.is_admin:
            raise NotAllowed("This needs an admin's key; the one given is a user's.")


@dataclass(frozen=True, slots=True)
class Trip:
    """One request's way through the server; `facts` is what its line in the log will say."""

    trace: str
    started: float = field(default_factory=perf_counter)
    facts: dict[str, Any] = field(default_factory=dict)
    work: list[asyncio.Task[Any]] = field(default_factory=list)  # may outlast the request

    @property
    def age_s(self) -> float:
        return perf_counter() - self.started


async def _of_app(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


async def _of_request(request: Request) -> Caller:
    """The caller that access control left with the request; without keys, whoever reaches us."""
    caller: Caller = getattr(request.state, "caller", None) or Caller()
    return caller


async def _trip(request: Request) -> Trip:
    trip: Trip = request.state.trip
    return trip


Serving = Annotated[Service, Depends(_of_app)]
Asking = Annotated[Caller, Depends(_of_request)]
Way = Annotated[Trip, Depends(_trip)]


async def _admin(caller: Asking) -> None:
    caller.require_admin()


ADMIN = [Depends(_admin)]  # for routes that change what is served
