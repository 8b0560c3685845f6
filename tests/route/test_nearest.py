"""The router that only compares."""

from __future__ import annotations

import numpy as np
import pytest

from loramix.chat import Message
from loramix.errors import RouteError
from loramix.route.gate import GateRouter
from loramix.route.nearest import NearestRouter
from loramix.route.ngrams import Floats
from tests.route.small import FRAMES, fitted, held_out


class Sums:
    """Sentence vectors that say whose words a text has; words of nobody point elsewhere."""

    digest = "sums"

    def encode(self, texts: list[str]) -> Floats:
        rows = [[sum(w in text for w in FRAMES[n][1].split("|")) for n in FRAMES] for text in texts]
        length = [len(text) % 7 / 20 for text in texts]
        found = np.array([[*row, 0.1, more] for row, more in zip(rows, length, strict=True)])
        unit: Floats = (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)
        return unit


@pytest.fixture(scope="module", params=["n-grams", "sentence vectors"])
def stored(request: pytest.FixtureRequest) -> GateRouter:
    return fitted() if request.param == "n-grams" else fitted(encoder=Sums())


def said(router: NearestRouter, *texts: str) -> str:
    return str(router.route([Message("user", text) for text in texts]).mix)


def test_the_nearest_examples_name_the_adapter(stored: GateRouter) -> None:
    router = NearestRouter.of(stored)
    for name, queries in held_out().items():
        right = [next(iter(router.decide(query).mix.top(1)), "") == name for query in queries]
        assert np.mean(right) > 0.8
    assert said(router, "hm?!") == "base" == said(router, "")


def test_a_decision_is_its_scores_and_says_who_voted(stored: GateRouter) -> None:
    router, query = NearestRouter.of(stored), held_out()["baking"][0]
    found = router.decide(query)
    assert sum(found.scores.values()) + found.none == pytest.approx(1)
    assert router.scores([query])[0] == pytest.approx(list(found.scores.values()), abs=1e-6)
    assert found.nearest[0].adapter == "baking"
    assert found.nearest[0].text in found.reasons[1]
    assert router.scores([]) == []


def test_the_threshold_keeps_what_it_promises() -> None:
    for keep in (0.8, 0.95):
        router = NearestRouter.of(fitted(keep=keep))
        assert router.abstain.coverage == pytest.approx(keep, abs=0.03)


def test_examples_that_have_no_company_set_no_threshold() -> None:
    with pytest.raises(RouteError, match="two examples"):
        NearestRouter.of(fitted({"a": ["zebra crossing"], "b": ["quantum physics"]}))


def test_a_short_turn_follows_the_one_before() -> None:
    router = NearestRouter.of(fitted())
    query = held_out()["sailing"][0]
    assert said(router, query, "and then?") == "sailing"
    with pytest.raises(RouteError, match="No user message"):
        router.route([Message("system", "be brief")])
