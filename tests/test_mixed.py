"""What is served is what PEFT computes, and a mix is the dense sum: float32, to 1e-5."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from loramix.errors import BaseMismatch, UnknownAdapter
from loramix.formats import peft
from loramix.gates import ActiveMixes, Gates
from loramix.lora import Pair
from loramix.mix import Mix
from loramix.mixed import MixedLinear, MixedModel, linear_shapes
from tests.peft_twin import PROBE, load_in_peft, save_twin
from tests.tiny import folded, random_adapter, tiny_model

ATTENTION = ["q_proj", "v_proj"]
CONFIGS = {
    "plain": ("llama", {"target_modules": ATTENTION}),
    "every linear layer": ("llama", {"target_modules": "all-linear"}),
    "a regular expression": ("llama", {"target_modules": r".*\.1\.mlp\.(up|down)_proj"}),
    "some layers": ("llama", {"target_modules": ATTENTION, "layers_to_transform": [1]}),
    "one layer of a pattern": (
        "qwen3",
        {"target_modules": ATTENTION, "layers_to_transform": 0, "layers_pattern": "layers"},
    ),
    "rsLoRA": ("llama", {"target_modules": ATTENTION, "use_rslora": True}),
    "ranks and alphas by pattern": (
        "llama",
        {
            "target_modules": [*ATTENTION, "o_proj"],
            "rank_pattern": {"q_proj": 2, r"layers\.1\.self_attn\.v_proj": 6},
            "alpha_pattern": {"v_proj": 3, "^model.layers.0.self_attn.o_proj": 1},
        },
    ),
    "patterns under rsLoRA": (
        "llama",
        {"target_modules": ATTENTION, "use_rslora": True, "rank_pattern": {"q_proj": 7}},
    ),
    "DoRA": ("llama", {"target_modules": ATTENTION, "use_dora": True}),
    "DoRA with biases": ("opt", {"target_modules": ["q_proj", "fc1"], "use_dora": True}),
    "DoRA under rsLoRA": (
        "llama",
        {"target_modules": ["down_proj"], "use_dora": True, "use_rslora": True},
    ),
    "Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "Conv1D with DoRA": (
        "gpt2",
        {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "use_dora": True},
    ),
    "fused projections": ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj"]}),
    "fused heads": ("gpt_neox", {"target_modules": ["query_key_value", "dense"]}),
    "the output layer": ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    "a gaussian start": ("llama", {"target_modules": ATTENTION, "init_lora_weights": "gaussian"}),
    "an orthogonal start": (
        "llama",
        {"target_modules": ATTENTION, "init_lora_weights": "orthogonal"},
    ),
    "no start": ("llama", {"target_modules": ATTENTION, "init_lora_weights": False}),
    "MiCA": ("llama", {"target_modules": ATTENTION, "init_lora_weights": "mica"}),
    "modules excluded": (
        "llama",
        {"target_modules": "all-linear", "exclude_modules": ["up_proj", "lm_head"]},
    ),
}


def logits(mixed, names, weights):
    with torch.inference_mode(), mixed.active.using(Gates(tuple(names), torch.tensor(weights))):
        return mixed.model(PROBE).logits


@pytest.mark.parametrize("case", CONFIGS)
def test_one_adapter_equals_pefts_own_forward(case, tmp_path):
    architecture, config = CONFIGS[case]
    model = tiny_model(architecture)
    expected = save_twin(model, tmp_path / "twin", **config)
    bare = model(PROBE).logits
    assert (expected - bare).abs().max() > 1e-2
    adapter = peft.read(tmp_path / "twin")
    mixed = MixedModel(model)
    mixed.bind(adapter)
    torch.testing.assert_close(logits(mixed, ["twin"], [[[1.0]]]), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(model(PROBE).logits, bare)


@pytest.mark.parametrize("case", CONFIGS)
def test_what_is_written_loads_in_peft(case, tmp_path):
    architecture, config = CONFIGS[case]
    model = tiny_model(architecture)
    expected = save_twin(model, tmp_path / "twin", **config)
    peft.write(peft.read(tmp_path / "twin"), tmp_path / "ours")
    ours = load_in_peft(model, tmp_path / "ours")
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3"])
def test_a_batch_of_mixes_equals_folded_weights_row_by_row(architecture):
    model = tiny_model(architecture)
    adapters = {
        "a": random_adapter(model, "a", rank=2, seed=1),
        "b": random_adapter(model, "b", rank=5, seed=2, share=0.5),
        "c": random_adapter(model, "c", rank=1, seed=3, share=0.3, dora=True),
    }
    mixes = [Mix({"a": 0.45, "b": 0.55}), Mix({"a": -1, "b": 0.2, "c": 2})]
    expected = [
        folded(model, mix, adapters)(PROBE[i : i + 1]).logits[0] for i, mix in enumerate(mixes)
    ]
    mixed = MixedModel(model)
    for adapter in adapters.values():
        mixed.bind(adapter)
    rows = [[[mix.get(name, 0.0) for name in adapters]] for mix in mixes]
    got = logits(mixed, adapters, rows)
    torch.testing.assert_close(got, torch.stack(expected), rtol=1e-5, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    weights=st.lists(st.floats(-2, 2, width=32), min_size=3, max_size=3),
    ranks=st.lists(st.integers(1, 6), min_size=3, max_size=3),
    conv=st.booleans(),
    biased=st.booleans(),
)
def test_a_layer_adds_the_weighted_sum_of_its_updates(weights, ranks, conv, biased):
    torch.manual_seed(0)
    base = Conv1D(10, 12) if conv else nn.Linear(12, 10, bias=biased)
    layer = MixedLinear(base, ActiveMixes())
    pairs = {
        name: Pair(torch.randn(rank, 12), torch.randn(10, rank))
        for name, rank in zip("abc", ranks, strict=True)
    }
    for name, pair in pairs.items():
        layer.bind(name, pair)
    x = torch.randn(2, 5, 12)
    with torch.no_grad(), layer.active.using(Gates(tuple(pairs), torch.tensor([[weights]]))):
        got = layer(x)
    delta = sum(w * pair.delta() for w, pair in zip(weights, pairs.values(), strict=True))
    expected = base(x) + x @ delta.T
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)


def test_float16_that_overflows_stays_with_the_rows_that_ask_for_it():
    layer = MixedLinear(nn.Linear(4, 4, bias=False).half(), ActiveMixes())
    layer.bind("huge", Pair(torch.full((1, 4), 6e4), torch.ones(4, 1)).to(torch.float16))
    x = torch.ones(2, 1, 4, dtype=torch.float16)
    with torch.no_grad(), layer.active.using(Gates(("huge",), torch.tensor([[[0.0]], [[1.0]]]))):
        got = layer(x)
    assert torch.equal(got[0], layer.base(x[:1])[0])
    assert got[1].isinf().all()


def test_the_gates_end_with_the_pass():
    active = ActiveMixes()
    gates = Gates(("a",), torch.ones(1, 1, 1))
    with pytest.raises(RuntimeError), active.using(gates):
        raise RuntimeError
    assert active.gates == ()


def test_gates_by_token_start_a_mix_inside_a_row():
    model = tiny_model()
    adapter = random_adapter(model, "a")
    mixed = MixedModel(model)
    mixed.bind(adapter)
    weights = torch.zeros(2, PROBE.shape[1], 1)
    weights[:, 5:] = 1
    got = logits(mixed, ["a"], weights.tolist())
    bare = model(PROBE).logits
    torch.testing.assert_close(got[:, :5], bare[:, :5], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(got[:, 5:], bare[:, 5:])


def test_release_puts_the_base_back():
    model = tiny_model()
    before = dict(model.named_modules())
    mixed = MixedModel(model)
    mixed.bind(random_adapter(model, "a"))
    assert dict(model.named_modules()).keys() != before.keys()
    mixed.release()
    assert dict(model.named_modules()) == before


def test_two_models_can_wrap_one_base():
    model = tiny_model()
    a, b = random_adapter(model, "a", seed=1), random_adapter(model, "b", seed=2, dora=True)
    shapes = linear_shapes(model)
    expected = folded(model, Mix({"b": 1}), {"b": b})(PROBE).logits
    outer, inner = MixedModel(model), None
    outer.bind(a)
    assert linear_shapes(model) == shapes
    inner = MixedModel(model)
    inner.bind(b)
    torch.testing.assert_close(logits(inner, ["b"], [[[1.0]]]), expected, rtol=1e-5, atol=1e-5)
    inner.release()
    assert isinstance(model.get_submodule(next(iter(a.pairs))), MixedLinear)


def test_an_adapter_of_another_base_is_refused_and_leaves_no_trace():
    model = tiny_model("llama")
    before = dict(model.named_modules())
    mixed = MixedModel(model)
    with pytest.raises(BaseMismatch, match=r"find no linear layer in this base \(first: gpt_neox"):
        mixed.bind(random_adapter(tiny_model("gpt_neox"), "a"))
    wider = random_adapter(tiny_model("llama", hidden_size=64), "a")
    pairs = {layer: pair for layer, pair in wider.pairs.items() if "up_proj" in layer}
    with pytest.raises(BaseMismatch, match=r"shape \(48, 64\) .* \(48, 32\)"):
        mixed.bind(dataclasses.replace(wider, pairs=pairs))
    assert dict(model.named_modules()) == before
    with pytest.raises(UnknownAdapter):
        mixed.unbind("a")


def test_layers_of_one_input_share_one_product_for_all_their_as(monkeypatch):
    model = tiny_model("llama")
    mixed = MixedModel(model)
    for seed, name in enumerate(("a", "b")):
        mixed.bind(random_adapter(model, name, rank=3 + seed, seed=seed))
    gates = Gates(("a", "b"), torch.tensor([[[0.5, -1.0]]]))
    widths, results = [], []

    def counted(x, matrix, bias=None):
        widths.append(matrix.shape[1])
        return torch.nn.functional.linear(x, matrix, bias)

    monkeypatch.setattr("loramix.gates.product", counted)
    for keep in (False, True, True):  # in the first pass that keeps them, layers find each other
        widths.clear()
        with (
            torch.inference_mode(),
            mixed.active.using(dataclasses.replace(gates, keep=keep)),
        ):
            results.append(model(PROBE).logits)
    fresh, found, shared = results
    assert sum(width > 3 + 4 for width in widths) == 2 * 4
    torch.testing.assert_close(fresh, found)
    torch.testing.assert_close(fresh, shared)
