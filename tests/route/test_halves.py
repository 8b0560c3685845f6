"""Two skills in one query: where it is cut, and when the second adapter is believed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramix.chat import Message
from loramix.route.encode import Tokens, unit
from loramix.route.gate import GateRouter
from loramix.route.halves import MOST_WORDS, Halves, _pairs, _places, _sketch, cut
from loramix.route.rows import read
from tests.route.small import fitted, held_out
from tests.route.test_saved import Letters

BOTH = "knead the rye loaf until it is risen whereupon how do i reef the mainsail in a squall"


@pytest.fixture(scope="module")
def router() -> GateRouter:
    return fitted(encoder=Letters())


def halves_of(router: GateRouter, text: str) -> Halves | None:
    """Without the sentence encoder, which reads letters here and no sense."""
    gate = fitted().gate if router.encoder else router.gate
    whole = gate.log_probs(read([text], router.ngrams, None))[0]
    return cut(text, whole, gate, router.ngrams, None)


def test_the_cut_lies_at_the_seam_and_names_both() -> None:
    router = fitted()
    halves = halves_of(router, BOTH)
    assert halves is not None
    assert halves.two
    assert [router.adapters[i] for i in halves.adapters] == ["baking", "sailing"]
    assert "risen" in halves.parts[0]
    assert "reef" in halves.parts[1]
    assert " ".join(halves.parts) == BOTH


def test_single_queries_have_no_second_adapter() -> None:
    router = fitted()
    texts = [text for group in held_out().values() for text in group]
    found = [halves_of(router, text) for text in texts]
    assert any(found)
    assert sum(h.two for h in found if h) <= 0.05 * len(texts)


def route(router: GateRouter, text: str) -> tuple[set[str], tuple[str, ...]]:
    decision = router.route([Message("user", text)])
    return set(decision.mix), decision.reasons


def test_the_router_mixes_both_and_says_which_half_is_whose(router: GateRouter) -> None:
    names, reasons = route(router, BOTH)
    assert names == {"baking", "sailing"}
    assert reasons[0].startswith("two skills: baking in 'knead")
    assert "and sailing in" in reasons[0]


def test_a_loaded_router_finds_the_same_two(router: GateRouter, tmp_path: Path) -> None:
    router.save(tmp_path / "router")
    loaded = GateRouter.load(tmp_path / "router", encoder=Letters())
    assert route(loaded, BOTH)[0] == {"baking", "sailing"}


def test_a_half_that_is_nobodys_brings_no_second(router: GateRouter) -> None:
    names, _ = route(router, "knead the rye loaf until it is risen and who wrote the first novel")
    assert len(names) <= 1


def test_hard_routing_and_ngrams_alone_do_not_cut() -> None:
    one = fitted(encoder=Letters(), top=1)
    assert len(route(one, BOTH)[0]) <= 1
    assert fitted().halves(BOTH, np.zeros(4, np.float32)) is None


def test_one_adapter_short_and_long_texts_are_not_cut() -> None:
    router = fitted()
    lonely = fitted({"baking": held_out()["baking"]})
    assert halves_of(lonely, BOTH) is None
    assert halves_of(router, "knead the dough reef sails") is None
    assert halves_of(router, "dough " * (MOST_WORDS + 1)) is None


@given(st.integers(0, MOST_WORDS + 5))
def test_cuts_lose_no_word(count: int) -> None:
    words = [f"w{i}" for i in range(count)]
    text = "  ".join(words)
    places = _places(text)
    assert all([*text[:i].split(), *text[i:].split()] == words for i in places)
    assert len(places) == (max(0, count - 5) if count <= MOST_WORDS else 0)


def test_a_sketch_averages_the_tokens_of_either_side() -> None:
    states = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)  # ends and four words
    found = _sketch(Tokens(states, np.array([0, 0, 3, 6, 9, 0])), [3, 6])
    assert found is not None
    sides = [states[1:2], states[1:3], states[2:5], states[3:5]]
    np.testing.assert_allclose(found, unit(np.stack([s.mean(0) for s in sides])), atol=1e-6)


def test_a_sketch_of_a_text_cut_short_has_no_empty_side() -> None:
    states = np.ones((4, 3), np.float32)  # the tokens end before the second place
    found = _sketch(Tokens(states, np.array([0, 0, 3, 0])), [3, 900])
    assert found is not None
    assert np.isfinite(found).all()


@given(st.integers(2, 6), st.integers(0, 2**32 - 1))
def test_the_pair_is_the_best_of_all_pairs(adapters: int, seed: int) -> None:
    left, right = np.random.default_rng(seed).normal(size=(2, 5, adapters + 1)).astype(np.float32)
    sums, first, second = _pairs(left, right)
    for i in range(5):
        every = [
            left[i, a] + right[i, b] for a in range(adapters) for b in range(adapters) if a != b
        ]
        assert first[i] != second[i]
        assert sums[i] == max(every) == left[i, first[i]] + right[i, second[i]]
