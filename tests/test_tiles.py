"""Products by tiles: right to rounding, for every shape, and of a row whatever is beside it."""

import shutil

import pytest
import torch

from loramix.engine import Request, Sampling
from loramix.engine.local import LocalEngine
from loramix.errors import EngineError
from loramix.mix import Mix
from loramix.mixed import Gates, MixedModel
from loramix.tiles import Tiler, fits
from tests.tiny import random_adapter, tiny_base, tiny_model

BF16 = torch.bfloat16
ROUNDING = 2.0**-8  # half a unit in the last place of bfloat16, and the input's own

needs_tiles = pytest.mark.skipif(
    not torch.cpu._is_avx512_bf16_supported() or shutil.which("cc") is None,
    reason="no AVX512-BF16, or no C compiler",
)


@pytest.fixture(scope="module")
def tiler():
    return Tiler()


def drawn(*shape):
    return torch.randn(shape).to(BF16)


def off(found, wanted):
    return float((found.double() - wanted).abs().max() / wanted.abs().max())


@needs_tiles
@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 33])
@pytest.mark.parametrize(("outputs", "width"), [(16, 32), (8, 1024), (40, 2), (384, 96), (50, 130)])
def test_products_are_right_to_rounding(tiler, rows, outputs, width):
    torch.manual_seed(rows)
    matrix, x = drawn(outputs, width), drawn(1, rows, width)
    scale, y = drawn(1, rows, outputs), drawn(1, rows, outputs)
    plain, tiles = x.double() @ matrix.double().T, tiler.tiles(matrix)
    assert off(tiles.scaled(x, scale), plain * scale.double()) < ROUNDING
    wanted = y.double() + plain
    tiles.add(x, y)
    assert off(y, wanted) < ROUNDING


@needs_tiles
def test_rows_may_lie_apart_and_nothing_beside_the_sum_is_written(tiler):
    x, matrix = drawn(1, 5, 48), drawn(20, 16)
    y = torch.zeros(1, 7, 20, dtype=BF16)
    tiler.tiles(matrix).add(x[..., 16:32], y[:, 1:6])
    assert off(y[:, 1:6], x[..., 16:32].double() @ matrix.double().T) < ROUNDING
    assert not y[:, [0, 6]].any()


@needs_tiles
def test_numbers_of_a_row_that_lie_apart_are_read_right(tiler):
    x, matrix, scale = drawn(1, 32, 5).transpose(1, 2), drawn(16, 32), drawn(1, 5, 16)
    wanted = (x.double() @ matrix.double().T) * scale.double()
    assert off(tiler.tiles(matrix).scaled(x, scale), wanted) < ROUNDING


def test_what_tiles_cannot_hold_does_not_fit():
    for matrix in (drawn(4, 3), drawn(4, 0), drawn(0, 4), torch.zeros(4, 4)):
        assert not fits(matrix)
    assert fits(drawn(4, 4))


@needs_tiles
def test_a_row_is_the_same_bit_for_bit_whatever_is_beside_it(tiler):
    x, scale, tiles = drawn(1, 21, 64), drawn(1, 21, 24), tiler.tiles(drawn(24, 64))
    together = tiles.scaled(x, scale)
    for n in range(21):
        alone = tiles.scaled(x[:, n : n + 1], scale[:, n : n + 1])
        assert torch.equal(alone, together[:, n : n + 1])


@needs_tiles
def test_a_model_with_tiles_computes_what_it_does_without(architecture, tiler):
    def logits(tiler):
        model = tiny_model(architecture).to(BF16)
        mixed = MixedModel(model, tiler)
        for n in range(3):
            mixed.bind(random_adapter(model, f"a{n}", seed=n, rank=2 * n + 2), BF16)
        weights = torch.tensor([[[0.5, 0.5, 0.0], [0.0, 1.0, -1.0], [0.0, 0.0, 0.0], [2.0, 0, 1]]])
        gates = Gates(("a0", "a1", "a2"), weights, keep=True)
        with torch.inference_mode(), mixed.active.using(gates):
            return model(torch.tensor([[5, 17, 31, 200]])).logits.double()

    assert off(logits(tiler), logits(None)) < 8 * ROUNDING


@needs_tiles
def test_an_engine_answers_with_tiles_beside_adapters_that_they_cannot_hold():
    base = tiny_base()
    base.model.to(BF16)
    fitting = random_adapter(base.model, "even", rank=4)
    odd = random_adapter(base.model, "odd", rank=3)
    with LocalEngine(base, [fitting, odd], tiles=True) as engine:
        requests = [
            Request((5, 6, 7), Mix(mix), Sampling(temperature=0, max_tokens=4))
            for mix in ({"even": 1.0}, {"odd": 1.0}, {"even": 0.5, "odd": 0.5}, {})
        ]
        assert [answer.num_tokens for answer in engine.generate(requests)] == [4] * 4


def test_what_tiles_need_and_is_not_there_is_said(monkeypatch):
    with pytest.raises(EngineError, match="bfloat16 base on the CPU"):
        LocalEngine(tiny_base(), tiles=True)
    monkeypatch.setattr("loramix.tiles.shutil.which", lambda _: None)
    if torch.cpu._is_avx512_bf16_supported():
        with pytest.raises(EngineError, match="C compiler"):
            Tiler()
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    with pytest.raises(EngineError, match="AVX512-BF16"):
        Tiler()


@needs_tiles
def test_left_open_tiles_are_for_large_bases_that_they_suit(monkeypatch):
    def has_tiles() -> bool:
        base = tiny_base()
        base.model.to(BF16)
        with LocalEngine(base) as engine:
            return engine.has_tiles

    assert not has_tiles()
    monkeypatch.setattr("loramix.tiles.LARGE", 0)
    assert has_tiles()
    with LocalEngine(tiny_base()) as engine:  # of float32
        assert not engine.has_tiles
