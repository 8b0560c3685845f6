"""Packed layers compute bit for bit what the plain ones do, and give them back."""

import copy

import pytest
import torch
from torch import nn

from loramix import frozen
from loramix.frozen import PackedEmbedding, PackedLinear, can_pack, pack, unpack
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


def test_a_packed_model_answers_bit_for_bit_and_is_itself_again(architecture):
    model = bfloat16(architecture)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = dict(model.named_modules())
    wanted = logits(model)
    pack(model)
    assert any(isinstance(layer, PackedLinear) for layer in model.modules())
    assert not any(type(layer) is nn.Linear for layer in model.modules())
    assert torch.equal(logits(model), wanted)
    unpack(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert dict(model.named_modules()) == modules
    assert torch.equal(logits(model), wanted)


def tied(vocabulary):
    torch.manual_seed(0)
    model = nn.ModuleDict({"embed": nn.Embedding(vocabulary, 32)})
    model["head"] = nn.Linear(32, vocabulary, bias=False)
    model["head"].weight = model["embed"].weight
    return model.to(torch.bfloat16).requires_grad_(False)


def test_a_tied_embedding_reads_the_packed_rows_and_is_tied_again():
    model = tied(128)
    matrix = model["embed"].weight.clone()
    pack(model)
    assert isinstance(model["embed"], PackedEmbedding)
    assert list(model.parameters()) == []  # the plain matrix is gone
    ids = torch.tensor([[0, 1, 63], [64, 127, 5]])
    assert torch.equal(model["embed"](ids), matrix[ids])
    assert torch.equal(model["embed"].weight, matrix)
    unpack(model)
    assert model["embed"].weight is model["head"].weight
    assert torch.equal(model["head"].weight, matrix)


@pytest.mark.parametrize("vocabulary", [100, 128])
def test_where_rows_cannot_be_read_the_embedding_keeps_its_own(vocabulary, monkeypatch):
    model = tied(vocabulary)
    shared = model["embed"].weight
    if vocabulary % frozen.TILE == 0:  # a layout that is not the expected one
        monkeypatch.setattr(frozen, "read_rows", lambda tiles, ids: torch.zeros(len(ids), 32))
    pack(model)
    assert type(model["embed"]) is nn.Embedding
    assert isinstance(model["head"], PackedLinear)
    unpack(model)
    assert model["embed"].weight is model["head"].weight is shared


def test_float32_and_what_others_hold_stay_as_they_are():
    model = tiny_model("llama").requires_grad_(False)
    pack(model)
    assert not any(isinstance(layer, PackedLinear) for layer in model.modules())
    model = bfloat16("llama")
    other = copy.deepcopy(model, {id(tensor): tensor for tensor in model.parameters()})
    wanted = logits(other)
    pack(model)
    assert torch.equal(logits(other), wanted)
