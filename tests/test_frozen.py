"""Packed layers compute bit for bit what the plain ones do, and give them back."""

import copy

import pytest
import torch
from torch import nn

from loramix import frozen
from loramix.frozen import PATIENCE, FrozenEmbedding, FrozenLayers, FrozenLinear, can_pack, product
from tests.tiny import tiny_model

IDS = torch.tensor([[5, 17, 31, 5, 200, 9]])

pytestmark = pytest.mark.skipif(
    not can_pack(torch.empty(2, 2, dtype=torch.bfloat16)), reason="this CPU packs no bfloat16"
)


def bfloat16(architecture, **options):
    return tiny_model(architecture, **options).to(torch.bfloat16).requires_grad_(False)


def logits(model):
    with torch.inference_mode():
        return model(IDS).logits


def turned_all(layers, num_requests):
    for _ in range(PATIENCE + len(layers.layers)):
        layers.suit(num_requests)


def test_a_model_in_either_form_answers_bit_for_bit_and_is_itself_again(architecture):
    model = bfloat16(architecture)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = dict(model.named_modules())
    wanted = logits(model)
    layers = FrozenLayers(model)
    assert not any(type(layer) is nn.Linear for layer in model.modules())
    for num_requests in (2, 1, 5):
        turned_all(layers, num_requests)
        assert {layer.is_packed for layer in layers.layers} == {num_requests > 1}
        assert torch.equal(logits(model), wanted)
    layers.release()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert dict(model.named_modules()) == modules
    assert torch.equal(logits(model), wanted)


def test_layers_turn_only_for_what_lasts_and_a_few_at_a_time(monkeypatch):
    monkeypatch.setattr(frozen, "TURNED_AT_ONCE", 3)
    layers = FrozenLayers(bfloat16("llama"))

    def num_packed(num_requests):
        layers.suit(num_requests)
        return sum(layer.is_packed for layer in layers.layers)

    assert [num_packed(2), num_packed(3), num_packed(2)] == [3, 6, 9]
    assert [num_packed(1) for _ in range(PATIENCE + 1)] == [9] * (PATIENCE - 1) + [6, 3]
    assert num_packed(2) == 6


def test_one_row_of_a_plain_matrix_is_its_product_in_either_precision():
    torch.manual_seed(0)
    matrix, bias = torch.randn(96, 40).bfloat16(), torch.randn(96).bfloat16()
    for x in (torch.randn(40), torch.randn(1, 1, 40), torch.randn(2, 3, 40)):
        found = product(x.bfloat16(), matrix, bias).float()
        wanted = x.bfloat16().float() @ matrix.float().T + bias.float()
        torch.testing.assert_close(found, wanted, rtol=0.01, atol=0.05)
        assert torch._C._get_mkldnn_enabled()


def tied(vocabulary):
    torch.manual_seed(0)
    model = nn.ModuleDict({"embed": nn.Embedding(vocabulary, 32)})
    model["head"] = nn.Linear(32, vocabulary, bias=False)
    model["head"].weight = model["embed"].weight
    return model.to(torch.bfloat16).requires_grad_(False)


@pytest.mark.parametrize("turns", [0, 1, 2])
def test_a_tied_embedding_reads_the_rows_of_either_form_and_is_tied_again(turns):
    model = tied(128)
    matrix = model["embed"].weight.clone()
    layers = FrozenLayers(model)
    assert isinstance(model["embed"], FrozenEmbedding)
    for _ in range(turns):
        model["head"].turn()
    assert not any(tensor.numel() for tensor in model.parameters())  # there is no other copy
    ids = torch.tensor([[0, 1, 63], [64, 127, 5]])
    assert torch.equal(model["embed"](ids), matrix[ids])
    assert torch.equal(model["embed"].weight, matrix)
    layers.release()
    assert model["embed"].weight is model["head"].weight
    assert torch.equal(model["head"].weight, matrix)


@pytest.mark.parametrize("vocabulary", [100, 128])
def test_where_packed_rows_cannot_be_read_the_embedding_keeps_its_own(vocabulary, monkeypatch):
    model = tied(vocabulary)
    matrix = model["embed"].weight.clone()
    layers = FrozenLayers(model)
    if vocabulary % frozen.BLOCK == 0:  # a layout that is not the expected one
        monkeypatch.setattr(frozen, "read_rows", lambda tiles, ids: torch.zeros(len(ids), 32))
    model["head"].turn()
    assert torch.equal(model["embed"](torch.tensor([3, 99])), matrix[[3, 99]])
    layers.release()
    assert model["embed"].weight is model["head"].weight
    assert torch.equal(model["head"].weight, matrix)


def test_float32_and_what_others_hold_stay_as_they_are():
    model = tiny_model("llama").requires_grad_(False)
    FrozenLayers(model)
    assert not any(isinstance(layer, FrozenLinear) for layer in model.modules())
    model = bfloat16("llama")
    other = copy.deepcopy(model, {id(tensor): tensor for tensor in model.parameters()})
    wanted = logits(other)
    layers = FrozenLayers(model)
    turned_all(layers, 2)
    assert torch.equal(logits(other), wanted)
