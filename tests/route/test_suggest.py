"""Suggestions on a world whose faults were put there."""

from __future__ import annotations

from loramix.route.suggest import suggest
from tests.route.small import fitted, rows, train


def test_a_sound_router_gets_no_suggestion() -> None:
    assert suggest(fitted()) == ({}, (), ())


def test_a_wrong_label_and_a_short_adapter_are_found() -> None:
    examples = train()
    wrong = "how do i reef the mainsail in a calm before the north wind"
    examples["baking"] = [*examples["baking"], wrong]
    examples["zoo"] = ["feed the giraffe", "where is the lion"]
    found = suggest(fitted(examples))
    assert found.short == {"zoo": 2}
    assert (wrong, "baking", "sailing") in [suspect[:3] for suspect in found.suspects]


def test_adapters_with_the_same_queries_overlap() -> None:
    garden = rows("garden")
    examples = {**train(), "garden": garden[::2], "plants": garden[1::2]}
    found = suggest(fitted(examples))
    assert found.overlaps[0][:2] == ("garden", "plants")
    assert found.overlaps[0].share > 0.2
    assert {name for pair in found.overlaps for name in pair[:2]} == {"garden", "plants"}
