"""Corrections: they act at once, outlive a crash, can be taken back, and join only if harmless."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramix.chat import Message
from loramix.errors import RouteError, UnknownAdapter
from loramix.route.encode import NgramEncoder
from loramix.route.feedback import CorrectedRouter, FeedbackLog
from loramix.route.gate import GateRouter
from loramix.route.ngrams import Sparse
from loramix.route.refit import refit, refit_in, score
from tests.route.small import fitted, held_out

REEF = "how do i reef the mainsail in a squall"
ODD = "which oven mitt suits a skipper"


@pytest.fixture(scope="module")
def gate() -> GateRouter:
    return fitted()


@pytest.fixture
def router(gate: GateRouter, tmp_path: Path) -> CorrectedRouter:
    return CorrectedRouter(gate, FeedbackLog(tmp_path / "_router"))


def ask(router: CorrectedRouter, text: str) -> str:
    return str(router.route([Message("user", text)]).mix)


def test_a_correction_acts_at_once_and_until_it_is_undone(router: CorrectedRouter) -> None:
    assert ask(router, REEF) == "sailing"
    made = router.correct(REEF, "garden")
    assert ask(router, REEF) == "garden"
    assert ask(router, REEF.upper() + "?") == "garden"
    assert made.id in router.route([Message("user", REEF)]).reasons[0]
    router.log.undo(made.id)
    assert ask(router, REEF) == "sailing"


def test_the_base_can_be_right_and_the_newest_word_counts(router: CorrectedRouter) -> None:
    router.correct(REEF, "garden")
    router.correct(REEF, None)
    assert ask(router, REEF) == "base"


def test_a_correction_acts_on_queries_like_it_and_on_no_others(router: CorrectedRouter) -> None:
    others = [text for name in ("baking", "garden") for text in held_out()[name]]
    before = [ask(router, text) for text in others]
    router.correct(REEF, "garden")
    assert ask(router, "how do i reef a mainsail in the squall") == "garden"
    assert ask(router, "is the anchor safe during a calm") == "sailing"
    assert [ask(router, text) for text in others] == before


def test_another_process_is_heard(router: CorrectedRouter) -> None:
    FeedbackLog(router.log.path.with_name("_router")).correct(REEF, "garden")
    assert ask(router, REEF) == "garden"


@given(st.integers(0, 200))
def test_a_torn_last_line_costs_that_line_alone(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    log = FeedbackLog(tmp_path_factory.mktemp("log") / "_router")
    first, _ = log.correct(REEF, "garden"), log.correct(ODD, None)
    raw = log.path.read_bytes()
    start = raw.index(b"\n") + 1
    log.path.write_bytes(raw[: min(start + cut, len(raw) - 1)])
    assert log.corrections() == (first,)
    third = log.correct("lower the jib", "sailing")
    assert log.corrections()[0] == first
    assert log.corrections()[-1] == third


def test_what_cannot_be_kept_is_refused(router: CorrectedRouter, tmp_path: Path) -> None:
    with pytest.raises(UnknownAdapter, match="sailing"):
        router.correct(REEF, "sialing")
    with pytest.raises(RouteError, match="no words"):
        router.correct("?!", "sailing")
    with pytest.raises(RouteError, match="to undo"):
        router.log.undo("nothing")
    with pytest.raises(RouteError, match="Cannot use"):
        FeedbackLog(tmp_path / "missing" / "_router").correct(REEF, None)
    assert not router.log.path.exists()


def test_a_refit_teaches_and_forgets(router: CorrectedRouter) -> None:
    made = router.correct(ODD, "sailing")
    found = refit(router.gate, router.log)
    assert found.router is not None
    assert found.after >= found.before
    assert found.joined == (made.id,)
    assert ODD in found.router.examples["sailing"]
    router.log.join(found.joined)
    assert router.log.corrections()[0].joined
    router.log.undo(made.id)
    again = refit(found.router, router.log)
    assert again.router is not None
    assert again.router.examples == router.gate.examples


def test_corrections_that_spoil_the_gate_do_not_join(router: CorrectedRouter) -> None:
    for text in router.gate.examples["sailing"][8:]:
        router.correct(text, "baking")
    found = refit(router.gate, router.log)
    assert found.router is None
    assert found.after < found.before
    assert found.joined == ()


def test_a_query_is_read_once(router: CorrectedRouter, monkeypatch: pytest.MonkeyPatch) -> None:
    router.correct(REEF, "garden")
    ask(router, REEF)
    read: list[str] = []
    matrix = NgramEncoder.matrix

    def counted(self: NgramEncoder, texts: list[str]) -> Sparse:
        read.extend(texts)
        return matrix(self, texts)

    monkeypatch.setattr(NgramEncoder, "matrix", counted)
    ask(router, "how do i reef a mainsail in the squall")
    assert read == ["how do i reef a mainsail in the squall"]


def test_a_refit_that_dies_leaves_the_router_whole(
    gate: GateRouter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "_router"
    gate.add("zoo", ["feed the giraffe", "is the zebra asleep"]).save(folder)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    monkeypatch.setattr("numpy.savez", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        refit_in(folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [file.name for file in tmp_path.iterdir()] == ["_router"]
    monkeypatch.undo()
    assert refit_in(folder).router is not None
    assert not GateRouter.load(folder).fresh
    assert refit_in(folder).router is None


def test_a_refit_begins_again_if_the_router_was_replaced_meanwhile(
    gate: GateRouter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "_router"
    gate.add("zoo", ["feed the giraffe"]).save(folder)
    other, refits = gate.add("zoo", ["feed the zebra"]), []

    def slow(self: GateRouter) -> GateRouter:
        if not refits:
            other.save(folder)
        refits.append(self.examples["zoo"])
        return self.refitted(self.examples)

    monkeypatch.setattr(GateRouter, "refit", slow)
    refit_in(folder)
    assert refits == [("feed the giraffe",), ("feed the zebra",)]
    assert GateRouter.load(folder).examples["zoo"] == ("feed the zebra",)


def test_the_score_is_that_of_decisions(router: CorrectedRouter) -> None:
    rows = router.gate.rows()
    names = [*rows.adapters, "base"]
    right = [
        str(router.gate.route([Message("user", t)]).mix.top(1)) == names[k]
        for t, k in zip(rows.texts, rows.labels, strict=True)
    ]
    assert score(router.gate, rows) == pytest.approx(sum(right) / len(right))
