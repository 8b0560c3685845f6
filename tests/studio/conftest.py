"""A server with the chat page, over the tiny shop: NiceGUI knows one app in a process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest
from fastapi import FastAPI
from nicegui import core
from nicegui.testing.user import User

from loramix.engine.local import LocalEngine
from loramix.library import Library
from loramix.lm import LM, load_router
from loramix.serve.app import create_app
from loramix.serve.limits import Limits
from loramix.serve.service import Service
from loramix.store import Store
from loramix.studio.site import with_page
from tests.serve.front import Front, running
from tests.shop import Shop
from tests.tiny import tiny_base

T = TypeVar("T")


@dataclass(frozen=True)
class Site:
    """A server with a page; `act` runs on its event loop, where pages live."""

    front: Front
    app: FastAPI

    def act(self, work: Coroutine[Any, Any, T]) -> T:
        assert core.loop is not None
        return asyncio.run_coroutine_threadsafe(work, core.loop).result(timeout=60)

    def user(self, **headers: str) -> User:
        transport = httpx.ASGITransport(self.app)
        return User(
            httpx.AsyncClient(transport=transport, base_url="http://localhost", headers=headers)
        )


@pytest.fixture(scope="session")
def whole_site(shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    database = tmp_path_factory.mktemp("studio") / "studio.db"
    base, library = tiny_base(seed=1), Library(Path(shop.library))
    base.model.generation_config.eos_token_id = None  # answers are as long as they may be
    engine = LocalEngine(base, library=library)
    with (
        LM(engine, library, load_router(library)) as lm,
        Store.open(f"sqlite:///{database}") as store,
    ):
        service = Service(lm, store, limits=Limits(answer_tokens=24))
        app = create_app(service)
        with_page(app)
        with running(service, app) as front:
            yield Site(front, app)


@pytest.fixture
def site(whole_site: Site) -> Iterator[Site]:
    """Without keys and conversations, before and after."""
    yield whole_site
    store = whole_site.front.service.kept
    for key in store.keys.list():
        store.keys.remove(key.name)
    for head in whole_site.front.http.get("/v1/conversations").json()["data"]:
        whole_site.front.http.delete(f"/v1/conversations/{head['id']}")


@pytest.fixture
def slow(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine takes its time."""
    core: Any = site.front.service.lm.engine._core  # type: ignore[attr-defined]
    forward = core.forward

    def slow(batch: object) -> object:
        time.sleep(0.03)
        return forward(batch)

    monkeypatch.setattr(core, "forward", slow)
