"""An adapter joins at once, by examples or by its card; the others go on as they were."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from loramix.adapter import Card
from loramix.chat import Message
from loramix.errors import RouteError
from loramix.route import Decision
from loramix.route.abstain import background
from loramix.route.blend import look
from loramix.route.encode import NgramEncoder
from loramix.route.gate import GateRouter
from loramix.route.rows import read
from tests.route.small import fitted, held_out, train

ZOO = Card(
    "zoo-keeper",
    description="Feeds the animals of a zoo.",
    skills=("when to feed the giraffe", "cleaning the cage of a lion"),
    examples=("what does a zebra eat",),
)


class Spread:
    """Sentence vectors for tests: n-grams on 64 columns; remembers what it was given."""

    digest = "spread"

    def __init__(self) -> None:
        self.read: list[str] = []

    def encode(self, texts):  # type: ignore[no-untyped-def]
        self.read += texts
        rng = np.random.default_rng(0)
        rows = NgramEncoder(10).encode(texts) @ rng.normal(size=(1024, 64)).astype(np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture(scope="module", params=["ngrams", "vectors"])
def two(request: pytest.FixtureRequest) -> GateRouter:
    """A router that does not know baking."""
    known = {name: texts for name, texts in train().items() if name != "baking"}
    return fitted(known, encoder=NgramEncoder() if request.param == "ngrams" else Spread())


def ask(router: GateRouter, text: str) -> Decision:
    return router.route([Message("user", text)])


def mixes(router: GateRouter, texts: list[str]) -> list[str]:
    return [str(ask(router, text).mix.top(1)).partition(":")[0] for text in texts]


def test_it_is_routed_to_at_once(two: GateRouter) -> None:
    grown = two.add("baking", train()["baking"])
    assert grown.fresh == {"baking"}
    assert mixes(grown, held_out()["baking"]).count("baking") >= 0.9 * len(held_out()["baking"])


def test_the_others_decide_as_before_but_for_what_it_takes(two: GateRouter) -> None:
    texts = [*held_out()["garden"], *held_out()["sailing"], *background()[1::60]]
    grown = two.add("baking", train()["baking"])
    before, after = mixes(two, texts), mixes(grown, texts)
    assert all(a in (b, "baking") for b, a in zip(before, after, strict=True))
    assert after.count("baking") <= 0.02 * len(texts)


def test_the_others_rank_as_before_among_themselves(two: GateRouter) -> None:
    texts = [text for group in held_out().values() for text in group]
    batch = read(texts, two.ngrams, two.encoder)
    grown = two.add("baking", train()["baking"])
    before, after = two.gate.voices(batch), grown.gate.voices(batch)
    lead = before.ngrams[:, 0] - before.ngrams[:, 1]  # garden over sailing, which moved up by one
    np.testing.assert_allclose(after.ngrams[:, 1] - after.ngrams[:, 2], lead, atol=1e-4)


def test_its_threshold_keeps_its_fresh_queries(two: GateRouter) -> None:
    grown = two.add("baking", train()["baking"])
    batch = read(held_out()["baking"], two.ngrams, two.encoder)
    scores = grown.abstain.scores(look(batch, grown.gate, grown.neighbours))
    assert np.mean(scores >= grown.abstain.thresholds[0]) >= 0.9


def test_only_its_own_texts_are_embedded() -> None:
    encoder = Spread()
    router = fitted(encoder=encoder)
    encoder.read.clear()
    grown = router.add("zoo", ["feed the giraffe", "is the zebra asleep"])
    assert sorted(encoder.read) == ["feed the giraffe", "is the zebra asleep"]
    encoder.read.clear()
    grown.refit()
    assert not encoder.read


def test_a_card_is_enough_and_costs_the_others_nothing(two: GateRouter) -> None:
    grown = two.introduce(ZOO)
    decision = ask(grown, "when should i feed the giraffe")
    assert str(decision.mix) == "zoo-keeper"
    assert decision.coldness == 1
    assert "cold: zoo-keeper is known by its card only" in decision.reasons
    texts = [*held_out()["garden"], *held_out()["sailing"]]
    assert mixes(grown, texts) == mixes(two, texts)


def test_examples_end_the_coldness(two: GateRouter) -> None:
    cold = two.introduce(Card("baking", description="bread and cake"))
    warm = cold.add("baking", train()["baking"])
    assert (cold.cards, warm.cards) == ({"baking"}, set())
    assert warm.coldness("baking") == 0
    never_cold = two.add("baking", train()["baking"])
    texts = held_out()["baking"]
    np.testing.assert_allclose(warm.scores(texts), never_cold.scores(texts), atol=1e-4)
    assert warm.meet(Card("baking", description="something else")) is None


def test_a_refit_learns_no_weight_of_others_from_a_card() -> None:
    router = fitted()
    texts = [text for group in held_out().values() for text in group]
    cold = router.introduce(ZOO).refit()
    assert cold.cards == {"zoo-keeper"}
    assert mixes(cold, texts) == mixes(router, texts)
    without = cold.remove("zoo-keeper").scores(texts)
    np.testing.assert_allclose(without, router.scores(texts), atol=1e-4)


def test_cards_alone_make_a_router() -> None:
    router = fitted({}, cards=[ZOO, Card("sailing", description="sails, masts and rudders")])
    assert router.cards == {"zoo-keeper", "sailing"}
    assert str(ask(router, "what does the giraffe eat").mix) == "zoo-keeper"
    assert router.refit().cards == router.cards


def test_what_is_cold_or_fresh_is_saved(two: GateRouter, tmp_path: Path) -> None:
    grown = two.introduce(ZOO).add("baking", train()["baking"])
    grown.save(tmp_path / "r")
    again = GateRouter.load(tmp_path / "r", encoder=two.encoder or two.ngrams)
    assert (again.cards, again.fresh) == (grown.cards, grown.fresh)
    texts = held_out()["baking"]
    np.testing.assert_allclose(again.scores(texts), grown.scores(texts), atol=2e-2)


def test_wordless_examples_are_refused(two: GateRouter) -> None:
    with pytest.raises(RouteError, match="No example of 'zoo'"):
        two.add("zoo", ["...", ""])
    with pytest.raises(RouteError, match="last adapter"):
        two.remove("garden").remove("sailing")
