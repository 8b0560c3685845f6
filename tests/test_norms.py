"""Norms as one call: the model's own numbers, for every form of norm; other layers are left."""

import pytest
import torch
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from loramix.frozen import FrozenLayers
from loramix.norms import FORMS, FrozenNorm, frozen_norm
from loramix.tiles import Tiler
from tests.test_tiles import needs_tiles
from tests.tiny import tiny_model

BF16 = torch.bfloat16
KINDS = dict(zip((LlamaRMSNorm, Gemma2RMSNorm, Olmo2RMSNorm), FORMS, strict=True))


@pytest.fixture(scope="module")
def native():
    return Tiler().native


def of_width(kind, width, eps=1e-6):
    torch.manual_seed(width)
    layer = kind(width, eps=eps).to(BF16).requires_grad_(False)
    layer.weight += torch.randn(width) / 3
    return layer


@needs_tiles
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [8, 64, 100, 1024])
@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_each_form_of_norm_is_known_by_its_numbers(native, kind, width, eps):
    layer = of_width(kind, width, eps)
    ours = frozen_norm(layer, native)
    assert ours._form == KINDS[kind]
    for shape in ((1, 40, width), (3, width), (1, 4, 5, width)):
        x = (torch.randn(shape) * torch.rand(shape[:-1]).unsqueeze(-1).mul(9).exp()).to(BF16)
        found, wanted = ours(x), layer(x)
        assert found.shape == wanted.shape
        torch.testing.assert_close(found, wanted, rtol=2**-6, atol=0)
        assert (found == wanted).float().mean() > 0.98


@needs_tiles
def test_a_norm_of_heads_that_lie_apart_and_of_nothing(native):
    layer = of_width(LlamaRMSNorm, 32)
    ours = frozen_norm(layer, native)
    apart = torch.randn(1, 6, 4, 32).to(BF16).transpose(1, 2)
    torch.testing.assert_close(ours(apart), layer(apart), rtol=2**-6, atol=0)
    assert not ours(torch.zeros(1, 2, 32, dtype=BF16)).any()
    assert ours(apart[:, :0]).shape == (1, 0, 6, 32)


@needs_tiles
def test_a_row_is_the_same_bit_for_bit_whatever_is_beside_it(native):
    ours, x = frozen_norm(of_width(LlamaRMSNorm, 1024), native), torch.randn(64, 1024).to(BF16)
    together = ours(x)
    assert all(torch.equal(ours(x[n : n + 1]), together[n : n + 1]) for n in range(64))


class OddRMSNorm(LlamaRMSNorm):
    """A norm of its own kind under a name that says nothing of it."""

    def forward(self, x):
        return super().forward(x) + 0.25


@needs_tiles
def test_what_is_no_known_norm_of_bfloat16_is_left(native):
    assert frozen_norm(of_width(OddRMSNorm, 16), native) is None
    assert frozen_norm(LlamaRMSNorm(16), native) is None  # of float32
    assert frozen_norm(nn.LayerNorm(16).to(BF16), native) is None
    assert frozen_norm(nn.Identity(), native) is None


@needs_tiles
def test_what_is_not_bfloat16_is_the_layers_own_affair(native):
    layer = of_width(LlamaRMSNorm, 16)
    x = torch.randn(2, 16)
    assert torch.equal(frozen_norm(layer, native)(x), layer(x))


@needs_tiles
def test_a_models_norms_are_taken_over_and_given_back():
    model = tiny_model().to(BF16).requires_grad_(False)
    before = {name: type(module) for name, module in model.named_modules()}
    names = [name for name in before if name.endswith("norm")]
    layers = FrozenLayers(model, Tiler())
    assert names
    assert all(isinstance(model.get_submodule(name), FrozenNorm) for name in names)
    layers.release()
    assert {name: type(module) for name, module in model.named_modules()} == before
