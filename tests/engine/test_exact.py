"""Bases that a packed row cannot serve exactly are refused by name, before any request."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from loramix.base import Base
from loramix.engine.exact import exact_context, require_exact
from loramix.engine.local import LocalEngine
from loramix.errors import EngineError
from tests.tiny import random_adapter, tiny_base, tiny_model, tiny_tokenizer

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
REFUSED = {
    "bloom": ({"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4}, "ALiBi"),
    "falcon": (SMALL | {"alibi": True}, "ALiBi"),
    "mpt": ({"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4}, "ALiBi"),
    "mamba": ({"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}, "linear_attention"),
    "mixtral": (SMALL | {"num_key_value_heads": 2, "num_local_experts": 2}, "fused-expert"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_models_that_are_not_exact_are_refused_by_name(kind):
    options, reason = REFUSED[kind]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **options)).eval()
    with pytest.raises(EngineError, match=f"{type(model).__name__} cannot be served.*{reason}"):
        LocalEngine(Base(kind, model, tiny_tokenizer(), ""))


def test_an_encoder_is_refused():
    config = AutoConfig.for_model(
        "t5", vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4
    )
    with pytest.raises(EngineError, match="it has an encoder"):
        require_exact(AutoModelForSeq2SeqLM.from_config(config))


def test_other_kinds_of_layers_are_refused():
    model = tiny_model()
    model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(EngineError, match="layers of type linear_attention"):
        require_exact(model)


def test_the_trial_notices_attention_that_differs():
    model = tiny_model()
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(scale_if_packed, with_kwargs=True)
    with pytest.raises(EngineError, match="in a trial its logits were off by"):
        require_exact(model)


def scale_if_packed(module, inputs, options):
    if module.config._attn_implementation == "loramix":
        options["hidden_states"] = options["hidden_states"] * 1.01
    return inputs, options


def test_the_trial_notices_windows_that_the_attention_is_not_told_of():
    model = tiny_model()
    model.config.sliding_window = 50
    with pytest.raises(EngineError, match="other than its config says"):
        require_exact(model)


def test_a_base_in_use_is_refused():
    base = tiny_base()
    engine = LocalEngine(base, [random_adapter(base.model, "a")])
    with engine, pytest.raises(EngineError, match="another engine or a training serves it now"):
        LocalEngine(base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_does_not_count_as_a_difference(architecture, dtype):
    require_exact(tiny_model(architecture).to(dtype))


def test_positions_that_depend_on_the_neighbours_end_the_context():
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, **factors}
    base = tiny_base("phi3", original_max_position_embeddings=40, rope_parameters=rope)
    assert (base.context, exact_context(base)) == (128, 40)
    assert exact_context(tiny_base()) == 128
