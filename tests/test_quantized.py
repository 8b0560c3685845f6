"""A quantised base is the base of its rounded matrices, and adapters are exact on top of it."""

import pytest
import torch
from torch import nn

from loramix.base import open_base
from loramix.engine import Request, Sampling
from loramix.engine.local import LocalEngine
from loramix.errors import BaseError
from loramix.linear import matrix_of
from loramix.mix import Mix
from loramix.quantized import Int8Linear, Nf4Linear, quantize
from tests.rounded import KINDS, WIDE, needs
from tests.tiny import folded, random_adapter, tiny_base, tiny_model, tiny_tokenizer

PROMPT = (5, 17, 31, 5, 200, 9)


def rounded_twin(kind):
    """A plain model that holds the rounded matrices in float32."""
    model, twin = tiny_model(**WIDE), tiny_model(**WIDE)
    quantize(model, kind)
    for name, layer in model.named_modules():
        if isinstance(layer, KINDS[kind]):
            twin.get_submodule(name).weight = nn.Parameter(layer.weight, requires_grad=False)
    return twin


@pytest.mark.parametrize("kind", KINDS)
def test_a_mix_over_a_quantised_base_equals_its_folded_rounded_weights(kind):
    needs(kind)
    base = tiny_base(**WIDE)
    quantize(base.model, kind)
    adapters = [random_adapter(base.model, name, rank=3, seed=n) for n, name in enumerate("ab")]
    adapters.append(random_adapter(base.model, "d", rank=2, seed=9, dora=True))
    mixes = [Mix(), Mix({"a": 0.5, "b": -1.2}), Mix({"d": 1})]
    requests = [Request(PROMPT, mix, Sampling(temperature=0, max_tokens=12)) for mix in mixes]
    with LocalEngine(base, adapters) as engine:
        answers = engine.generate(requests)
    for mix, answer in zip(mixes, answers, strict=True):
        model = folded(rounded_twin(kind), mix, {adapter.name: adapter for adapter in adapters})
        output = model.generate(torch.tensor([PROMPT]), max_new_tokens=12, do_sample=False)
        assert answer.tokens == tuple(output[0, len(PROMPT) :].tolist())


def test_rounding_is_as_fine_as_eight_bits_and_halves_the_memory(architecture):
    model = tiny_model(architecture).to(torch.bfloat16)
    ids = torch.tensor([PROMPT])
    with torch.inference_mode():
        before = model(ids).logits.float()
        quantize(model)
        after = model(ids).logits.float()
    layers = [layer for layer in model.modules() if isinstance(layer, Int8Linear)]
    assert layers
    assert not isinstance(model.get_output_embeddings(), Int8Linear)
    assert all(layer.quantized.itemsize == 1 for layer in layers)
    assert 0 < float((after - before).norm() / before.norm()) < 0.05


def test_four_bits_are_a_quarter_of_the_memory_and_as_fine_as_those_of_qlora():
    needs("nf4")
    model, exact = (tiny_model(**WIDE).to(torch.bfloat16) for _ in range(2))
    quantize(model, "nf4")
    layers = {n: m for n, m in model.named_modules() if isinstance(m, Nf4Linear)}
    assert layers
    assert not isinstance(model.get_output_embeddings(), Nf4Linear)
    for name, layer in layers.items():
        matrix = matrix_of(exact.get_submodule(name)).float()
        assert 2 * layer.quantized.nbytes == matrix.numel()
        # Of normally distributed numbers in groups of 64, nf4 loses 9 %.
        assert 0.08 < float((layer.weight.float() - matrix).norm() / matrix.norm()) < 0.105


def test_four_bits_are_refused_where_bitsandbytes_gets_them_wrong():
    needs("nf4")
    model = tiny_model()
    with pytest.raises(BaseError, match="multiple of 64 inputs, and this base has some of 32"):
        quantize(model, "nf4")
    assert not any(isinstance(layer, Nf4Linear) for layer in model.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("rows", [1, 4, 5, 40])
def test_few_rows_and_many_are_the_same_product(dtype, rows):
    torch.manual_seed(rows)
    plain = nn.Linear(64, 48).to(dtype).requires_grad_(False)
    layer = Int8Linear(plain)
    x = torch.randn(1, rows, 64).to(dtype)
    wanted = x.float() @ layer.weight.float().T + plain.bias.float()
    with torch.inference_mode():
        torch.testing.assert_close(layer(x).float(), wanted, rtol=0.02, atol=0.03)


def test_a_row_of_zeros_stays_zero():
    plain = nn.Linear(8, 4, bias=False).requires_grad_(False)
    plain.weight[1] = 0
    assert torch.equal(Int8Linear(plain)(torch.ones(1, 8))[0, 1], torch.tensor(0.0))


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_is_opened_quantised_by_name_and_keeps_its_fingerprint(kind, tmp_path):
    needs(kind)
    tiny_model(**WIDE).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    plain = open_base(str(tmp_path), device="cpu")
    base = open_base(str(tmp_path), device="cpu", quantize=kind)
    assert base.quantized == kind
    assert base.fingerprint == plain.fingerprint
    assert base.dtype == torch.bfloat16
    assert any(isinstance(layer, KINDS[kind]) for layer in base.model.modules())
    with pytest.raises(BaseError, match="none, int8, nf4"):
        open_base(str(tmp_path), quantize="int4")


def test_large_activations_pass_in_float16():
    plain = nn.Linear(64, 4, bias=False).half().requires_grad_(False)
    x = torch.full((1, 64), 900.0).half()
    torch.testing.assert_close(Int8Linear(plain)(x), plain(x), rtol=0.1, atol=20)
