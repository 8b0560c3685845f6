"""Products by tiles: right to rounding, for every shape, and of a row whatever is beside it."""

import shutil

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from loramix.engine import Request, Sampling
from loramix.engine.local import LocalEngine
from loramix.errors import EngineError
from loramix.frozen import FrozenLayers
from loramix.gates import Gates
from loramix.mix import Mix
from loramix.mixed import MixedModel
from loramix.tiles import MOST_ROWS, Tiler, can_join, fits, joined
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
@pytest.mark.parametrize("rows", [32, 40])  # whole tiles, and not
def test_a_factor_may_lie_as_it_likes(tiler, rows):
    matrix, x = drawn(rows, 48), drawn(1, 3, 48)
    turned = matrix.T.contiguous().T
    at_odd_place = torch.cat([drawn(1), matrix.flatten()])[1:].view(rows, 48)
    apart = torch.stack([matrix, drawn(rows, 48)], dim=2)[..., 0]
    plain = x.double() @ matrix.double().T
    ones = torch.ones(1, 3, rows, dtype=BF16)
    for factor in (turned, at_odd_place, apart):
        assert off(tiler.tiles(factor).scaled(x, ones), plain) < ROUNDING


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


@needs_tiles
@pytest.mark.parametrize("rows", [1, 2, 6, 7, 8, 9, MOST_ROWS])
@pytest.mark.parametrize(("outputs", "width", "rank"), [(64, 32, 2), (192, 96, 34), (128, 1024, 8)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_an_update_is_summed_with_the_base_and_rounded_once(
    tiler, rows, outputs, width, rank, has_bias
):
    torch.manual_seed(rows)
    layer, x = of_a_base(nn.Linear(width, outputs, bias=has_bias)), drawn(1, rows, width)
    b, shrunk = drawn(outputs, rank), drawn(1, rows, rank + 6)[..., 3 : 3 + rank]
    wanted = x.double() @ layer.weight.double().T + shrunk.double() @ b.double().T
    if has_bias:
        wanted += layer.bias.double()
    bias, ours = layer.bias, frozen(layer, tiler)
    found = ours.for_few.product(x, bias, (shrunk, tiler.tiles(b)))
    assert float(((found.double() - wanted) / wanted.abs().clamp_min(0.05)).abs().max()) < ROUNDING
    plain = ours.for_few.product(x, bias)
    assert torch.equal(ours.for_few.product(x, bias, (0 * shrunk, tiler.tiles(b))), plain)
    alone = ours.for_few.product(x[:, -1:], bias, (shrunk[:, -1:], tiler.tiles(b)))
    assert torch.equal(alone, found[:, -1:])


def of_a_base(layer):
    return layer.to(BF16).requires_grad_(False)


def frozen(layer, tiler):
    """A layer as the engine takes it over; its matrix is there no more."""
    model = nn.Sequential(layer)
    FrozenLayers(model, tiler)
    assert model[0].for_few
    return model[0]


@needs_tiles
@pytest.mark.parametrize("rows", [1, 5, 6, 7, 8, 9, 17, MOST_ROWS, MOST_ROWS + 1])
@pytest.mark.parametrize(("outputs", "width"), [(64, 32), (128, 160), (192, 1024)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_products_with_a_base_are_right_to_rounding(tiler, rows, outputs, width, has_bias):
    torch.manual_seed(rows)
    layer, x = of_a_base(nn.Linear(width, outputs, bias=has_bias)), drawn(1, rows, width)
    wanted = x.double() @ layer.weight.double().T
    if has_bias:
        wanted += layer.bias.double()
    assert off(frozen(layer, tiler)(x), wanted) < ROUNDING


@needs_tiles
def test_rows_for_a_base_may_lie_as_they_like(tiler):
    layer, wide = of_a_base(nn.Linear(32, 64)), drawn(3, 2, 64)
    matrix, bias = layer.weight.double(), layer.bias.double()
    ours = frozen(layer, tiler)
    for x in (
        wide[..., 16:48],
        wide[0].T[:32].T,
        wide[:, 0, 32:],
        wide[0, 0, ::2],
        wide[:0, 0, :32],
    ):
        found = ours(x)
        assert found.shape == (*x.shape[:-1], 64)
        wanted = x.double() @ matrix.T + bias
        torch.testing.assert_close(found.double(), wanted, rtol=0.01, atol=0.01)


@needs_tiles
def test_a_base_whose_matrix_is_stored_turned_is_read_right(tiler):
    layer, x = of_a_base(Conv1D(128, 64)), drawn(1, 3, 64)
    wanted = x.double() @ layer.weight.double() + layer.bias.double()
    assert off(frozen(layer, tiler)(x), wanted) < ROUNDING


@needs_tiles
def test_a_row_of_a_base_is_the_same_bit_for_bit_whatever_is_beside_it(tiler):
    layer, x = frozen(of_a_base(nn.Linear(96, 128)), tiler), drawn(1, MOST_ROWS, 96)
    alone = torch.cat([layer(x[:, n : n + 1]) for n in range(MOST_ROWS)], dim=1)
    for rows in range(2, MOST_ROWS + 1):
        assert torch.equal(layer(x[:, :rows]), alone[:, :rows])


@needs_tiles
def test_what_is_not_of_the_bases_precision_is_not_misread(tiler):
    layer = frozen(of_a_base(nn.Linear(32, 64)), tiler)
    for x in (torch.randn(1, 32), torch.randn(1, 32).half()):
        with pytest.raises(RuntimeError):
            layer(x)


@needs_tiles
def test_a_base_that_does_not_lie_in_whole_tiles_turns_with_the_load_as_without(tiler):
    shapes = {(32, 64): True, (32, 50): False, (34, 64): False}  # (K, O)
    model = of_a_base(nn.ModuleList(nn.Linear(*shape) for shape in shapes))
    plain = [layer.weight for layer in model]
    layers = FrozenLayers(model, tiler)
    for num_requests, fallback in ((1, False), (2, True), (1, False)):
        for _ in range(20):
            layers.suit(num_requests)
        assert [layer.is_packed for layer in model] == [
            fits or fallback for fits in shapes.values()
        ]
        for layer, matrix in zip(model, plain, strict=True):
            x = drawn(1, 1, layer.in_features)
            assert off(layer(x), x.double() @ matrix.double().T + layer.bias.double()) < ROUNDING


@needs_tiles
def test_a_base_in_tiles_is_itself_again(architecture, tiler):
    model = tiny_model(architecture).to(BF16).requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.tensor([[5, 17, 31, 200]])
    with torch.inference_mode():
        wanted = model(ids).logits
        layers = FrozenLayers(model, tiler)
        assert off(model(ids).logits, wanted.double()) < 8 * ROUNDING
    layers.release()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert dict(model.state_dict()).keys() == before.keys()


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
@pytest.mark.parametrize("ranks", [(16, 32, 16), (4, 6, 2), (16, 3, 16)])
def test_sets_that_add_up_are_one_set_whether_tiles_hold_them_or_not(tiler, ranks):
    weights = torch.tensor([[[0.5, 0.5, 0.0, 0.1], [0.0, 1.0, -1.0, 2.0], [0.0, 0.0, 0.0, 0.0]]])

    def logits(tiler, *sets):
        model = tiny_model().to(BF16)
        mixed = MixedModel(model, tiler)
        for n, rank in enumerate(ranks):
            mixed.bind(random_adapter(model, f"a{n}", seed=n, rank=rank), BF16)
        mixed.bind(random_adapter(model, "a3", seed=3, dora=True), BF16)
        gates = [Gates(tuple(f"a{n}" for n in own), weights[..., own], keep=True) for own in sets]
        with torch.inference_mode(), mixed.active.using(*gates):
            return model(torch.tensor([[5, 17, 31]])).logits.double()

    wanted = logits(None, [0, 1, 2, 3])
    for sets in ([[0, 1, 2], [3]], [[0, 2], [1, 3]], [[0, 1], [2], [3]], [[3], [0, 1, 2]]):
        assert off(logits(tiler, *sets), wanted) < 16 * ROUNDING
        assert off(logits(None, *sets), wanted) < 16 * ROUNDING


@needs_tiles
@pytest.mark.parametrize(("outputs", "width"), [(16, 32), (40, 6), (3, 2)])
def test_tiles_are_joined_as_matrices_are(tiler, outputs, width):
    one, two = drawn(outputs, width), drawn(outputs, 2 * width)
    several = [tiler.tiles(one), tiler.tiles(two)]
    assert torch.equal(several[0].matrix(), one)
    assert torch.equal(joined(several, dim=1).matrix(), torch.cat([one, two], dim=1))
    below = [tiler.tiles(drawn(outputs, width)) for _ in range(3)]
    assert can_join(below, dim=0) == (outputs % 16 == 0)
    if can_join(below, dim=0):
        assert torch.equal(joined(below, 0).matrix(), torch.cat([t.matrix() for t in below]))


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
    monkeypatch.setattr("loramix.native.shutil.which", lambda _: None)
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
