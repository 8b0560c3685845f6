"""Follow-ups, switches and changes of subject, on the small world of three trades."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest

from loramix.chat import Message
from loramix.mix import Mix
from loramix.route import Decision
from loramix.route.feedback import CorrectedRouter, FeedbackLog
from loramix.route.gate import GateRouter
from loramix.route.turns import ELLIPTIC, LOOKBACK, MARGIN, follow
from tests.route.small import fitted

REEF = "how do i reef the mainsail in a squall"
KNEAD = "knead the dough until it is golden"
FOREIGN = "who wrote the first novel ever printed and translate good evening into japanese"
MORE = "and at night?"


@pytest.fixture(scope="module")
def router() -> GateRouter:
    return fitted()


def ask(router: GateRouter | CorrectedRouter, *queries: str) -> Decision:
    turns = [[Message("user", query), Message("assistant", "Yes.")] for query in queries]
    return router.route([message for turn in turns for message in turn][:-1])


def test_an_elliptic_turn_takes_over_the_mix(router: GateRouter) -> None:
    assert not ask(router, MORE).mix
    decision = ask(router, REEF, MORE)
    assert str(decision.mix) == "sailing"
    assert "follows the turn before" in decision.reasons[0]
    assert decision.none == ask(router, MORE).none
    assert str(ask(router, REEF, MORE, "and alone?", "...").mix) == "sailing"


def test_a_clear_turn_switches(router: GateRouter) -> None:
    assert str(ask(router, REEF, KNEAD).mix) == "baking"
    assert str(ask(router, REEF, KNEAD, MORE).mix) == "baking"


def test_a_change_of_subject_goes_to_the_base_and_stays_there(router: GateRouter) -> None:
    assert router.information(FOREIGN) > ELLIPTIC > router.information(MORE)
    assert not ask(router, REEF, FOREIGN).mix
    assert not ask(router, REEF, FOREIGN, MORE).mix


def test_what_is_not_sent_is_forgotten(router: GateRouter) -> None:
    ask(router, REEF)
    assert not ask(router, MORE).mix


def test_a_correction_stands_whatever_came_before_and_is_followed(
    router: GateRouter, tmp_path: Path
) -> None:
    corrected = CorrectedRouter(router, FeedbackLog(tmp_path / "_router"))
    made = corrected.correct(MORE, None)
    decision = ask(corrected, REEF, MORE)
    assert (decision.mix, decision.correction) == (Mix(), made.id)
    corrected.correct(FOREIGN, "garden")
    assert str(ask(corrected, REEF, FOREIGN, "and then?").mix) == "garden"


def leaning(lead: float) -> Decision:
    """A decision for "b" over "a" by so many nats; for "a" if that is negative."""
    share = 1 / (1 + math.exp(-lead))
    mix = Mix({"b" if lead > 0 else "a": 1})
    return Decision(mix, {"a": 1 - share, "b": share}, 0.0, (), 0.0)


def decided(*leads: float) -> tuple[str, list[int]]:
    """The mix of a conversation whose turns lean so, and which turns were looked at."""
    seen: list[int] = []

    def decide(turn: str) -> Decision:
        seen.append(int(turn))
        return leaning(leads[int(turn)])

    turns: Sequence[str] = [str(n) for n in range(len(leads))]
    return str(follow(decide, lambda _: math.inf, turns).mix), seen


def test_a_switch_needs_a_margin() -> None:
    assert decided(-9, MARGIN - 0.1) == ("a", [1, 0])
    assert decided(-9, MARGIN + 0.1) == ("b", [1])
    assert decided(9, MARGIN - 0.1) == ("b", [1, 0])
    assert decided(MARGIN - 0.1) == ("b", [0])
    assert decided(-9, 0.1, 0.1) == ("a", [2, 1, 0])


def test_no_more_than_the_last_few_turns_count() -> None:
    mix, seen = decided(-9, *[0.1] * (LOOKBACK + 1))
    assert mix == "b"
    assert 0 not in seen
