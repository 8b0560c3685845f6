"""One server over the tiny shop for all tests that leave it as it is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import loramix
from loramix.lm import LM
from loramix.serve.service import Service
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
