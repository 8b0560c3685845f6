"""The router end to end, on a world small enough to fit in a second."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loramix.chat import Message
from loramix.errors import LoramixError, RouteError, UnknownAdapter
from loramix.mix import Mix
from loramix.route import Decision, to_mix
from loramix.route.blend import look
from loramix.route.calibration import stays, tuned, with_thresholds
from loramix.route.gate import GateRouter
from loramix.route.rows import read
from tests.route.small import fitted, held_out, rows, train

FOREIGN = (
    "who wrote the first novel ever printed",
    "translate good evening into japanese",
    "is my flight to oslo delayed",
    "tell me about the moons of jupiter",
    "my phone does not charge any more",
)


@pytest.fixture(scope="module")
def router() -> GateRouter:
    return fitted()


def ask(router: GateRouter, text: str) -> Decision:
    return router.route([Message("user", text)])


def test_held_out_queries_reach_their_adapter(router: GateRouter) -> None:
    for name, texts in held_out().items():
        routed = [str(ask(router, text).mix) for text in texts]
        assert routed.count(name) >= 0.9 * len(routed)


def test_foreign_queries_go_to_the_base(router: GateRouter) -> None:
    for text in FOREIGN:
        decision = ask(router, text)
        assert decision.mix == Mix()
        assert decision.reasons[0].startswith("base: in-scope score")


def test_a_decision_adds_up_and_explains_itself(router: GateRouter) -> None:
    decision = ask(router, "how do i reef the mainsail in a squall")
    assert decision.mix == Mix({"sailing": 1})
    assert tuple(decision.scores) == router.adapters == ("baking", "garden", "sailing")
    assert sum(decision.scores.values()) + decision.none == pytest.approx(1, abs=1e-5)
    assert any("near" in reason and "mainsail" in reason for reason in decision.reasons)
    assert any(reason.startswith("words for sailing:") for reason in decision.reasons)
    assert decision.latency_ms > 0


def test_scores_are_those_of_route(router: GateRouter) -> None:
    texts = ["knead the dough until it is golden", *FOREIGN]
    for text, row in zip(texts, router.scores(texts), strict=True):
        np.testing.assert_allclose(row, list(ask(router, text).scores.values()), atol=1e-5)
    assert router.scores([]) == []


def test_the_last_user_turn_decides(router: GateRouter) -> None:
    first, second = "knead the dough until it is golden", "how do i reef the jib in a swell"
    turns = [Message("user", first), Message("assistant", "Done."), Message("user", second)]
    assert str(router.route(turns).mix) == "sailing"
    assert str(router.route([*turns, Message("assistant", "knead dough")]).mix) == "sailing"


def test_without_a_user_turn_there_is_nothing_to_route(router: GateRouter) -> None:
    for turns in ([], [Message("system", "Be brief.")]):
        with pytest.raises(RouteError, match="user message"):
            router.route(turns)


@pytest.mark.parametrize("text", ["", "   ", "?!\x00\x1b[", "\u200b\ufeff", "...", "\n" * 100_000])
def test_wordless_queries_go_to_the_base(router: GateRouter, text: str) -> None:
    decision = ask(router, text)
    assert decision.mix == Mix()
    assert decision.none == 1


@settings(max_examples=40, deadline=None)
@given(text=st.text(max_size=400))
def test_any_text_gives_a_sound_decision(router: GateRouter, text: str) -> None:
    decision = ask(router, text)
    assert sum(decision.scores.values()) + decision.none == pytest.approx(1, abs=1e-4)
    assert set(decision.mix) <= set(router.adapters)
    assert all("\n" not in reason for reason in decision.reasons)


def test_a_hundred_thousand_characters_are_answered_at_once(router: GateRouter) -> None:
    decision = ask(router, "reef the mainsail " * 6000)
    assert max(decision.scores, key=lambda name: decision.scores[name]) == "sailing"
    assert decision.latency_ms < 500


def test_fitting_is_deterministic_and_indifferent_to_order(router: GateRouter) -> None:
    shuffled = {name: texts[::-1] for name, texts in reversed(train().items())}
    again = fitted(shuffled)
    texts = [text for group in held_out().values() for text in group]
    assert again.scores(texts) == router.scores(texts)
    assert again.abstain == router.abstain


def test_repeated_examples_change_nothing(router: GateRouter) -> None:
    twice = {
        name: [*texts, *(f"{text.upper()} !" for text in texts)] for name, texts in train().items()
    }
    again = fitted(twice)
    assert again.abstain == router.abstain


def test_an_added_adapter_is_routed_to_and_a_removed_one_is_not() -> None:
    known = {name: texts for name, texts in train().items() if name != "baking"}
    router = fitted(known)
    query = "why is my brioche not risen"
    assert ask(router, query).mix == Mix()
    grown = router.add("baking", train()["baking"])
    assert str(ask(grown, query).mix) == "baking"
    assert router.adapters == ("garden", "sailing")
    shrunk = grown.remove("baking")
    np.testing.assert_allclose(shrunk.scores([query]), router.scores([query]), atol=1e-5)
    with pytest.raises(UnknownAdapter, match="baking"):
        shrunk.remove("baking")


def test_a_refit_after_adding_equals_fitting_anew(router: GateRouter) -> None:
    known = {name: texts for name, texts in train().items() if name != "garden"}
    grown = fitted(known).add("garden", train()["garden"]).refit()
    texts = [text for group in held_out().values() for text in group]
    assert grown.scores(texts) == router.scores(texts)


def test_one_adapter_is_a_router_too() -> None:
    router = fitted({"sailing": rows("sailing")[::2]})
    assert str(ask(router, "lower the jib before the squall").mix) == "sailing"
    assert ask(router, FOREIGN[0]).mix == Mix()


def test_every_adapter_cold_still_works() -> None:
    cards = {"sailing": ["reef a sail in a storm"], "baking": ["bake bread and cake"]}
    router = fitted(cards)
    assert str(ask(router, "how do i bake a cake").mix) == "baking"
    assert ask(router, FOREIGN[3]).mix == Mix()


def test_the_share_kept_follows_the_target() -> None:
    texts = [text for group in held_out().values() for text in group]
    loose, strict = (fitted(keep=keep) for keep in (0.95, 0.4))
    kept = [sum(bool(ask(r, text).mix) for text in texts) / len(texts) for r in (loose, strict)]
    assert kept[0] > kept[1] + 0.1
    assert kept[1] > 0.5
    assert strict.keep == 0.4


@pytest.mark.parametrize(
    ("examples", "options", "says"),
    [
        ({}, {}, "one adapter at least"),
        ({"a": []}, {}, "No example of 'a'"),
        ({"a": ["...", ""]}, {}, "No example of 'a'"),
        ({"base": ["hello"]}, {}, "cannot name an adapter"),
        ({"a": ["hello"]}, {"keep": 0.0}, "keep is a share"),
        ({"a": ["hello"]}, {"keep": 1.0}, "keep is a share"),
        ({"a": ["hello"]}, {"top": 0}, "at least 1"),
        ({"a": ["hello"]}, {"foreign": ["", "..."]}, "No foreign query"),
    ],
)
def test_what_cannot_be_fitted_is_refused(
    examples: dict[str, list[str]], options: dict[str, float], says: str
) -> None:
    with pytest.raises(LoramixError, match=says) as caught:
        fitted(examples, **options)
    assert "\n" not in str(caught.value)


def test_the_request_path_loads_neither_torch_nor_scikit_learn(
    router: GateRouter, tmp_path
) -> None:  # type: ignore[no-untyped-def]
    router.save(tmp_path / "r")
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from loramix.chat import Message\nfrom loramix.route.gate import GateRouter\n"
        f"r = GateRouter.load(Path({str(tmp_path / 'r')!r}))\n"
        "print(r.route([Message('user', 'how do i reef the jib in a swell')]).mix)\n"
        "print(*({'torch', 'sklearn', 'scipy', 'transformers', 'tokenizers'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout == "sailing\n\n"


@settings(deadline=None)
@given(
    scores=st.lists(st.floats(-20, 20), min_size=1, max_size=6),
    top=st.integers(1, 4),
    floor=st.floats(0, 0.5),
    temperature=st.floats(0.05, 5),
)
def test_to_mix_is_a_sparse_convex_mix(
    scores: list[float], top: int, floor: float, temperature: float
) -> None:
    names = [f"a{i}" for i in range(len(scores))]
    mix = to_mix(scores, names, top=top, temperature=temperature, floor=floor)
    assert 1 <= len(mix) <= top
    assert sum(mix.values()) == pytest.approx(1, abs=1e-3)
    assert min(mix.values()) >= floor - 1e-4
    assert names[int(np.argmax(scores))] in mix or scores.count(max(scores)) > 1


def test_fresh_queries_set_a_threshold_and_are_not_stored(router: GateRouter) -> None:
    name = router.adapters[0]
    fresh = [text for group in held_out().values() for text in group]
    found = tuned(router, {name: fresh})
    batch = read(fresh, router.ngrams, router.encoder)
    scores = found.abstain.scores(look(batch, found.gate, found.neighbours))
    assert np.mean(scores >= found.abstain.thresholds[0]) >= router.keep
    assert found.abstain.thresholds[0] != router.abstain.thresholds[0]
    assert found.abstain.thresholds[1:] == router.abstain.thresholds[1:]
    assert found.examples == router.examples


def test_a_threshold_needs_a_known_adapter_and_enough_queries(router: GateRouter) -> None:
    with pytest.raises(UnknownAdapter):
        tuned(router, {"nobody": ["hello there"]})
    with pytest.raises(RouteError, match="too few"):
        tuned(router, {router.adapters[0]: ["hello there"]})
    with pytest.raises(RouteError, match="too few"):
        tuned(router, {router.adapters[0]: []})


def test_another_share_of_one_adapters_queries_stays(router: GateRouter) -> None:
    name, fresh = router.adapters[0], held_out()[router.adapters[0]]
    strict = tuned(router, {name: fresh}, keep=0.7)
    scores = strict.abstain.scores(
        look(read(fresh, strict.ngrams, None), strict.gate, strict.neighbours)
    )
    assert np.mean(scores >= strict.abstain.thresholds[0]) == pytest.approx(0.7, abs=0.06)
    assert stays(strict, fresh) < stays(tuned(router, {name: fresh}, keep=0.95), fresh)


def test_a_threshold_can_be_said(router: GateRouter) -> None:
    name, query = "baking", held_out()["baking"][0]
    closed = with_thresholds(router, {name: 1e9})
    assert not ask(closed, query).mix
    assert closed.abstain.thresholds[1:] == router.abstain.thresholds[1:]
    assert ask(closed, held_out()["sailing"][0]).mix
    assert stays(with_thresholds(closed, {name: -1e9}), held_out()[name]) == 1
    with pytest.raises(UnknownAdapter):
        with_thresholds(router, {"nobody": 0.0})


def test_a_fading_router_is_as_strong_as_it_is_sure(router: GateRouter, tmp_path: Path) -> None:
    replace(router, fades=True).save(tmp_path / "r")
    fading = GateRouter.load(tmp_path / "r")
    for query in (group[0] for group in held_out().values()):
        plain, faded = ask(router, query), ask(fading, query)
        assert sum(plain.mix.values()) == pytest.approx(1)
        assert sum(faded.mix.values()) == pytest.approx(1 - faded.none, abs=1e-3)
        assert set(plain.mix) == set(faded.mix)
    assert fading.remove("baking").fades
