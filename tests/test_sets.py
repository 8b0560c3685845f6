"""A step uses sets of adapters that lie side by side already; new ones come a few layers a step."""

from __future__ import annotations

import pytest

from loramix.sets import MOST_SETS, STEPS, Sets


class Layers:
    """Stands for the layers of one input: which sets they hold."""

    def __init__(self):
        self.held = set()

    def block(self, names):
        self.held.add(names)

    def drop(self, names):
        self.held.discard(names)


class Model:
    """What a step does with the sets of 64 groups of layers."""

    def __init__(self):
        self.layers = [Layers() for _ in range(64)]
        self.sets = Sets(lambda: self.layers)
        self.most = 0  # copies that one step waited for

    def step(self, names, spare=0.5):
        before = [set(layers.held) for layers in self.layers]
        self.sets.tidy()
        covering = self.sets.covering(names, spare)
        for layers in self.layers:
            for found in covering:
                layers.block(found)
        new = [len(now.held - old) for now, old in zip(self.layers, before, strict=True)]
        self.most = sum(new)
        assert {name for found in covering for name in found} >= set(names)
        assert sum(len(found) for found in covering) == len(set().union(*covering))
        return covering


@pytest.fixture
def model():
    model = Model()
    assert model.step("abcd") == [("a", "b", "c", "d")]
    return model


def test_a_new_adapter_is_beside_the_others_until_they_are_one_set(model):
    for _ in range(STEPS + 1):
        assert model.step("abcde") == [("a", "b", "c", "d"), ("e",)]
    assert model.step("abcde") == [("a", "b", "c", "d", "e")]
    assert model.most == 0  # copies


def test_no_step_waits_for_more_than_a_few_layers_of_a_set(model):
    model.step("abcde")
    for _ in range(STEPS + 2):
        model.step("abcde")
        assert model.most <= 64 / STEPS


def test_a_set_with_half_more_serves_and_one_with_more_only_until_a_smaller_is_there(model):
    assert model.step("abc") == [("a", "b", "c", "d")]
    assert model.step("ab") == [("a", "b", "c", "d")]
    for _ in range(STEPS + 2):
        model.step("ab")
    assert model.step("ab") == [("a", "b")]
    assert model.step("d") == [("d",)]


def test_many_new_adapters_are_laid_out_at_once(model):
    assert model.step("defg") == [("d", "e", "f", "g")]
    assert model.step("xyz", spare=0) == [("x", "y", "z")]


def test_where_nothing_is_spare_the_set_is_those_alone(model):
    assert model.step("abc", spare=0) == [("a", "b", "c")]
    assert model.step("abce", spare=0) == [("a", "b", "c", "e")]


def test_a_set_that_is_no_longer_wanted_is_given_up_half_way(model):
    model.step("abcde")
    model.step("abcde")
    model.step("abcdf")
    for _ in range(STEPS + 1):
        found = model.step("abcdf")
    assert found == [("a", "b", "c", "d", "f")]
    assert not any(("a", "b", "c", "d", "e") in layers.held for layers in model.layers)


def test_an_adapter_that_leaves_takes_its_sets_along(model):
    model.step("abcde")
    for name in "ae":
        for layers in model.layers:
            layers.held = {held for held in layers.held if name not in held}
        model.sets.forget(name)
    assert model.step("bcd") == [("b", "c", "d")]
    for _ in range(STEPS + 2):
        model.step("bcd")
    assert all("e" not in held for layers in model.layers for held in layers.held)


def test_sets_that_are_not_used_are_dropped(model):
    for name in "pqrstuv":
        model.step(name)
    model.sets.tidy()
    assert all(len(layers.held) <= MOST_SETS for layers in model.layers)
