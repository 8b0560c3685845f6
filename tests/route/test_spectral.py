"""The router that asks the adapters' own matrices."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from loramix.adapter import Adapter
from loramix.base import Base
from loramix.chat import Message, prompt_ids
from loramix.errors import RouteError
from loramix.lora import Pair
from loramix.mixed import MixedModel
from loramix.route import spectral
from loramix.route.spectral import Ear, SpectralRouter
from tests.tiny import random_adapter, tiny_base

QUERIES = ("where is my card", "select all names", "a fine film", "2 + 2?")


@pytest.fixture(scope="module")
def base() -> Base:
    return tiny_base()


@pytest.fixture(scope="module")
def adapters(base: Base) -> list[Adapter]:
    found = [random_adapter(base.model, n, seed=i, rank=2 + i) for i, n in enumerate("abc")]
    layer = next(iter(found[0].pairs))
    return [replace(found[0], pairs={layer: found[0].pairs[layer]}), *found[1:]]


@pytest.fixture(scope="module")
def router(base: Base, adapters: list[Adapter]) -> SpectralRouter:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spectral, "GENERIC", 20)
        return SpectralRouter.of(base, adapters)


def inputs(base: Base, text: str) -> dict[str, torch.Tensor]:
    """What every linear layer is given, [T, D]."""
    found: dict[str, torch.Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, given, name=name: found.update({name: given[0][0]})
        )
        for name, module in base.model.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    ids = prompt_ids(base.tokenizer, (Message("user", text),))
    with torch.inference_mode():
        base.model(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return found


def test_energy_is_the_norm_of_the_update(base: Base, adapters: list[Adapter]) -> None:
    heard = Ear(base, adapters).energies("my card")
    layers = sorted({layer for adapter in adapters for layer in adapter.pairs})
    given = inputs(base, "my card")
    for layer, row in zip(layers, heard, strict=True):
        for adapter, energy in zip(adapters, row, strict=True):
            if layer not in adapter.pairs:
                assert np.isnan(energy)
                continue
            x = given[layer]
            ratio = (x @ adapter.pairs[layer].delta().T).norm(dim=1) / x.norm(dim=1)
            assert energy == pytest.approx(float(ratio.log().mean()), abs=1e-4)


def test_a_stronger_adapter_is_no_likelier(
    base: Base, adapters: list[Adapter], router: SpectralRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    louder = {n: Pair(p.a, 5 * p.b) for n, p in adapters[1].pairs.items()}
    monkeypatch.setattr(spectral, "GENERIC", 20)
    other = SpectralRouter.of(base, [adapters[0], replace(adapters[1], pairs=louder), adapters[2]])
    np.testing.assert_allclose(other.scores(QUERIES), router.scores(QUERIES), atol=1e-2)


def test_it_listens_while_the_base_is_served(
    base: Base, adapters: list[Adapter], router: SpectralRouter
) -> None:
    before = router.scores(QUERIES)
    mixed = MixedModel(base.model)
    mixed.bind(adapters[0], base.dtype)
    try:
        assert router.scores(QUERIES) == before
    finally:
        mixed.release()


def test_the_last_turns_best_score_decides(router: SpectralRouter) -> None:
    for query, row in zip(QUERIES, router.scores(QUERIES), strict=True):
        found = router.route([Message("user", "before"), Message("user", query)])
        assert set(found.mix) == {"abc"[int(np.argmax(row))]}
        assert sum(found.scores.values()) == pytest.approx(1)


def test_it_needs_adapters_and_a_user(base: Base, router: SpectralRouter) -> None:
    with pytest.raises(RouteError, match="one adapter"):
        SpectralRouter.of(base, [])
    with pytest.raises(RouteError, match="No user message"):
        router.route([Message("system", "be brief")])
