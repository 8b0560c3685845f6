"""Routers by their names."""

from __future__ import annotations

from pathlib import Path

import pytest

from loramix.base import Base, open_base
from loramix.chat import Message
from loramix.errors import MixSyntaxError, RouteError
from loramix.library import Library
from loramix.lm import ROUTER
from loramix.route.feedback import CorrectedRouter
from loramix.route.fixed import FixedRouter, RulesRouter
from loramix.route.gate import GateRouter
from loramix.route.nearest import NearestRouter
from loramix.route.spectral import SpectralRouter
from loramix.routers import open_router
from tests.shop import SQL, Shop


def no_base() -> Base:
    raise AssertionError("this router reads no base")


def test_each_kind_is_opened(shop: Shop, tmp_path: Path) -> None:
    shelf, rules = Library(shop.library), tmp_path / "rules.yaml"
    rules.write_text("rules: {sql: list}")
    kinds = {
        "auto": CorrectedRouter,
        "nearest": NearestRouter,
        f"nearest:{shelf.folder / ROUTER}": NearestRouter,
        str(shelf.folder / ROUTER): GateRouter,
        "fixed:sql:0.5+banking:0.5": FixedRouter,
        f"rules:{rules}": RulesRouter,
    }
    for what, kind in kinds.items():
        router = open_router(what, shelf, no_base)
        assert isinstance(router, kind)
        assert "sql" in router.route([Message("user", SQL)]).mix


def test_spectral_reads_the_base(shop: Shop) -> None:
    router = open_router("spectral", Library(shop.library), lambda: open_base(shop.base))
    assert isinstance(router, SpectralRouter)
    assert router.adapters == ("banking", "sql")


@pytest.mark.parametrize("what", ["", "gate", "fixed", "rules:", "spectral:x", "/nowhere"])
def test_a_router_of_no_such_name(shop: Shop, what: str) -> None:
    with pytest.raises(RouteError, match="expected auto, nearest, spectral"):
        open_router(what, Library(shop.library), no_base)


def test_what_a_name_names_is_looked_at(shop: Shop, tmp_path: Path) -> None:
    with pytest.raises(MixSyntaxError):
        open_router("fixed:a:b:c", Library(shop.library), no_base)
    with pytest.raises(RouteError, match="cannot be read"):
        open_router(f"rules:{tmp_path}/no.yaml", Library(shop.library), no_base)
    with pytest.raises(RouteError):
        open_router(f"nearest:{tmp_path}", Library(shop.library), no_base)
