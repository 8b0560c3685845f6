"""Servers over the tiny shop: one for all tests that leave it as it is, and those that keep."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import loramix
from loramix.lm import LM
from loramix.serve.service import Service
from loramix.store import Store
from tests.serve.front import Front, running
from tests.shop import Shop


@pytest.fixture(scope="session")
def front(shop: Shop) -> Iterator[Front]:
    with loramix.open(shop.base, shop.library) as lm, running(Service(lm)) as front:
        yield front


@pytest.fixture(scope="module")
def lm(shop: Shop) -> Iterator[LM]:
    with loramix.open(shop.base, shop.library) as lm:
        yield lm


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(f"sqlite:///{tmp_path}/loramix.db") as store:
        yield store


@pytest.fixture
def keeping(lm: LM, store: Store) -> Iterator[Front]:
    """A server with a store of its own."""
    with running(Service(lm, store)) as front:
        yield front
