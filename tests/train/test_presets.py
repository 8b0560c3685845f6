"""A preset is keys that could stand in the file, and what stands there holds."""

import dataclasses

import pytest

from loramix.cli.train import planned
from loramix.errors import TrainError
from loramix.train.presets import PRESETS
from loramix.train.recipe import plan

LEAST = {"model_name_or_path": "pocket", "output_dir": "out/brand", "dataset": "identity"}


def only(**keys):
    (expert,) = plan({**LEAST, **keys}).experts
    return expert.settings


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_keys_that_a_file_could_have(name):
    preset = PRESETS[name]
    by_hand = {
        "lora_rank": preset.rank,
        "lora_alpha": preset.ratio * preset.rank,
        "num_train_epochs": preset.epochs,
    }
    assert only(preset=name) == only(**by_hand)


def test_presets_are_in_order_of_their_strength():
    found = [only(preset=name) for name in ("gentle", "balanced", "override")]
    for key in ("rank", "scale", "epochs"):
        values = [getattr(settings, key) for settings in found]
        assert values == sorted(set(values))
    assert len({settings.rate for settings in found}) == 1


def test_what_is_given_holds_and_alpha_follows_the_rank():
    settings = only(preset="override", lora_rank=64, num_train_epochs=1)
    assert (settings.rank, settings.scale, settings.epochs) == (64, PRESETS["override"].ratio, 1)
    assert only(preset="override", lora_alpha=8).scale == 8 / PRESETS["override"].rank


def test_an_expert_has_its_own_preset_or_that_of_all():
    experts = {"a": {}, "b": {"preset": "gentle"}, "c": {"lora_rank": 3}}
    found = plan({**LEAST, "preset": "override", "experts": experts})
    ranks = [expert.settings.rank for expert in found.experts]
    assert ranks == [PRESETS["override"].rank, PRESETS["gentle"].rank, 3]


def test_it_is_told_what_a_preset_sets():
    (note,) = plan({**LEAST, "preset": "gentle", "lora_rank": 4}).notes
    assert note == "brand: the preset gentle sets lora_alpha 4, num_train_epochs 2."
    every = {"lora_rank": 4, "lora_alpha": 4, "num_train_epochs": 2}
    (note,) = plan({**LEAST, "preset": "gentle", **every}).notes
    assert "sets nothing" in note
    assert plan(LEAST).notes == ()


def test_a_preset_that_there_is_none_of_is_refused():
    with pytest.raises(TrainError, match="'strong'; expected gentle, balanced, override"):
        only(preset="strong")


def test_rows_alone_are_learned_by_the_balanced_preset_unless_another_is_named(tmp_path):
    def settings(*words):
        (expert,) = planned(list(words), tmp_path / "rows.jsonl", "x", "pocket", None).experts
        return expert.settings

    assert settings().rank == PRESETS["balanced"].rank
    assert settings("preset=gentle") == dataclasses.replace(
        settings(), rank=8, alpha=8.0, epochs=2.0
    )
