"""What is not exactly a LoRA is refused by name, in one line that says what to do."""

import json
import re

import pytest
import torch
from safetensors.torch import save, save_file

from loramix.errors import FormatError
from loramix.formats import peft
from loramix.formats.weights import PICKLE_SUFFIXES
from tests.formats import layouts
from tests.formats.layouts import CONFIG, LAYERS, LFS, OUT, D, R, folder, peft_tensors

A0, B0 = (f"base_model.model.{LAYERS[0]}.lora_{part}.weight" for part in "AB")
DORA = f"base_model.model.{LAYERS[0]}.lora_magnitude_vector"


def changed(**tensors):
    """The tensors of a good file with the first update's A, B or others changed."""
    named = {"A": A0, "B": B0, "magnitude": DORA}
    return peft_tensors() | {named.get(key, key): tensor for key, tensor in tensors.items()}


def without(name):
    return {key: tensor for key, tensor in peft_tensors().items() if key != name}


def write(place, name, content):
    place.mkdir(exist_ok=True)
    data = content if isinstance(content, bytes) else content.encode()
    (place / name).write_bytes(data)
    return place


CONFIGS = {  # fields of adapter_config.json, and what the message says
    "PiSSA": ({"init_lora_weights": "pissa"}, "changed the base before training"),
    "fast PiSSA": ({"init_lora_weights": "pissa_niter_16"}, "changed the base"),
    "OLoRA": ({"init_lora_weights": "olora"}, "path_initial_model_for_weight_conversion"),
    "CorDA": ({"init_lora_weights": "corda"}, "changed the base"),
    "LoftQ": ({"init_lora_weights": "loftq"}, "changed the base"),
    "LoRA-GA": ({"init_lora_weights": "lora_ga"}, "changed the base"),
    "an unheard-of start": ({"init_lora_weights": "zen"}, "unknown init_lora_weights 'zen'"),
    "modules_to_save": ({"modules_to_save": ["lm_head", "embed_tokens"]}, "is lm_head, embed_tok"),
    "biases": ({"bias": "lora_only"}, "bias is lora_only"),
    "tokens": ({"trainable_token_indices": [7]}, "rows of the embedding"),
    "lora_bias": ({"lora_bias": True}, "carry a bias"),
    "aLoRA": ({"alora_invocation_tokens": [1, 2]}, "activated LoRA"),
    "experts": ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "MoE"),
    "replicated layers": ({"layer_replication": [[0, 4], [2, 5]]}, "more than once"),
    "QA-LoRA": ({"use_qalora": True}, "QA-LoRA"),
    "BD-LoRA": ({"use_bdlora": {"nblocks": 2}}, "block-diagonal"),
    "Arrow": ({"arrow_config": {"top_k": 3}}, "Arrow"),
    "KaSA": ({"kasa_config": {"beta": 1e-4}}, "KaSA"),
    "MonteCLoRA": ({"monteclora_config": {"n": 2}}, "samples its factors"),
    "Megatron": ({"megatron_config": {"tp": 2}}, "Megatron"),
    "prompt tuning": ({"peft_type": "PROMPT_TUNING"}, "type PROMPT_TUNING, not LORA"),
    "AdaLoRA": ({"peft_type": "ADALORA"}, "type ADALORA, not LORA"),
    "a classifier": ({"task_type": "SEQ_CLS"}, "trained for SEQ_CLS"),
    "an encoder": ({"task_type": "FEATURE_EXTRACTION"}, "trained for FEATURE_EXTRACTION"),
    "a translator": ({"task_type": "SEQ_2_SEQ_LM"}, "trained for SEQ_2_SEQ_LM"),
    "a classifier's class": (
        {"task_type": None, "auto_mapping": {"base_model_class": "GPT2ForSequenceClassification"}},
        "trained for GPT2ForSequenceClassification",
    ),
    "an unknown field": ({"use_rslora_v2": True}, "unknown field 'use_rslora_v2'.*'use_rslora'"),
    "an unheard-of field": ({"wobble": 3}, "unknown field 'wobble', which may change the result"),
    "another rank": ({"r": 4}, "has rank 2, its config says 4"),
    "another rank by pattern": ({"rank_pattern": {"v_proj": 8}}, "has rank 2, its config says 8"),
    "no rank": ({"r": 0}, "r is 0; expected a number from 1 up"),
    "rank as text": ({"r": "8"}, "r is '8'"),
    "alpha as text": ({"lora_alpha": "16"}, "lora_alpha is '16'; expected a number"),
    "alpha not finite": ({"lora_alpha": float("inf")}, "expected a finite number"),
    "alpha zero": ({"lora_alpha": 0}, "changes nothing"),
    "alpha absurd": ({"lora_alpha": 1e308}, "overflows"),
    "flag as text": ({"use_dora": "yes"}, "use_dora is 'yes'; expected true or false"),
    "patterns as list": ({"rank_pattern": [1]}, "expected an object"),
    "targets as number": ({"target_modules": 3}, "target_modules is 3"),
    "a broken expression": ({"target_modules": "(q_proj"}, "not a regular expression"),
    "a broken pattern": ({"alpha_pattern": {"[": 1}}, "not a regular expression"),
    "targets without updates": (
        {"target_modules": ["q_proj", "v_proj", "o_proj"]},
        "targets o_proj, but the file has no update",
    ),
    "updates without target": ({"target_modules": ["q_proj"]}, "1 of 2 updates.*first: .*v_proj"),
    "updates outside the expression": ({"target_modules": ".*q_proj"}, "1 of 2 updates"),
    "updates outside the layers": ({"layers_to_transform": [0]}, "1 of 2 updates.*layers.1"),
    "updates excluded": ({"exclude_modules": ["q_proj"]}, "1 of 2 updates.*q_proj"),
    "DoRA without magnitudes": ({"use_dora": True}, "use_dora is true .* has no magnitude"),
    "enable_lora on plain factors": ({"enable_lora": [True, False]}, "those of enable_lora"),
}  # fmt: skip

TENSORS = {  # tensors of the file, and what the message says
    "NaN": (changed(B=torch.full((OUT, R), torch.nan)), "NaN or infinity"),
    "infinity": (changed(A=torch.full((R, D), torch.inf)), "NaN or infinity"),
    "whole numbers": (changed(A=torch.ones(R, D, dtype=torch.int64)), "expected a float"),
    "eight bits": (changed(A=torch.ones(R, D).to(torch.float8_e4m3fn)), "expected a float"),
    "an A without B": (without(B0), "q_proj lacks its B"),
    "a B without A": (without(A0), "q_proj lacks its A"),
    "ranks that differ": (changed(B=torch.ones(OUT, R + 1)), r"A \[2, 6\] and B \[4, 3\]"),
    "one dimension": (changed(A=torch.ones(R * D)), r"A \[12\]"),
    "three dimensions": (changed(B=torch.ones(1, OUT, R)), "expected .R, D. and .O, R."),
    "no elements": (changed(A=torch.ones(0, D), B=torch.ones(OUT, 0)), "expected"),
    "swapped factors": (changed(A=torch.ones(D, R), B=torch.ones(R, OUT)), "swapped"),
    "a short magnitude": (changed(magnitude=torch.ones(3)), "use_dora is false"),
    "full tensors": (changed(**{"model.embed_tokens.weight": torch.ones(9, D)}), "embed_tokens"),
    "many full tensors": (
        changed(**{f"model.{i}.weight": torch.ones(1) for i in range(9)}),
        "model.0.weight, model.1.weight, model.2.weight and 6 more; read it with lora_only",
    ),
    "an embedding": (changed(**{"x.embed_tokens.lora_embedding_A": torch.ones(R, D)}), "embedding"),
    "an MLX embedding": (changed(**{"model.embed_tokens.lora_a": torch.ones(9, R)}), "embedding"),
    "a bias of B": (
        changed(**{f"{B0.removesuffix('weight')}bias": torch.ones(OUT)}),
        "a bias inside",
    ),
    "AdaLoRA": (changed(**{f"base_model.model.{LAYERS[0]}.lora_E": torch.ones(R, 1)}), "AdaLoRA"),
    "kohya": ({"lora_unet.x.lora_up.weight": torch.ones(2)}, "another kind of adapter"),
    "two adapters": (peft_tensors(".one") | peft_tensors(".two"), "two updates of"),
    "two names": (
        changed(**{f"base_model.model.l.lora_{p}.other.weight": torch.ones(2, 2) for p in "AB"}),
        "several adapters",
    ),
    "two layouts": (changed(**{"l.lora_a": torch.ones(2, 2)}), "mixes the layouts mlx and peft"),
    "two parametrizations": (
        {f"l.parametrizations.weight.{i}.lora_A": torch.ones(R, D) for i in (0, 1)},
        "a second parametrization",
    ),
    "a whole model": ({"model.embed_tokens.weight": torch.ones(9, 2)}, "no LoRA tensors but model"),
    "nothing": ({}, "no LoRA tensors but nothing"),
    "updates of zero": (
        {k: torch.zeros_like(v) if "lora_B" in k else v for k, v in peft_tensors().items()},
        "changes nothing: every update is zero",
    ),
    "prompt tuning": ({"prompt_embeddings": torch.ones(15, 9)}, "prompt tuning"),
}

WEIGHTS = {  # bytes in place of adapter_model.safetensors
    "an LFS pointer": (LFS.encode(), "git-LFS pointer.*git lfs pull"),
    "no bytes": (b"", "is empty"),
    "text": (b"not weights at all", "not a whole safetensors file"),
    "a truncated file": (save(peft_tensors())[:-9], "not a whole safetensors file"),
    "a truncated header": (save(peft_tensors())[:40], "not a whole safetensors file"),
    "a GGUF": (b"GGUF\x03\x00\x00\x00", "GGUF file"),
    "a pickle": (b"\x80\x04K\x01.", "not a whole safetensors file"),
}

CONFIG_FILES = {  # text in place of adapter_config.json
    "an LFS pointer": (LFS, "git-LFS pointer"),
    "no JSON": ("{", "is not JSON"),
    "no text": (b"\xff\xfe\x00", "cannot be read as text"),
    "a list": ("[]", "holds a JSON list; expected an object"),
    "a number": ("3", "holds a JSON int"),
    "deep nesting": ("[" * 100_000, "is not JSON"),
    "a number of 5,000 digits": ('{"lora_alpha": ' + "1" * 5000 + "}", "is not JSON"),
    "a number of 400 digits": (
        '{"peft_type": "LORA", "lora_alpha": ' + "1" * 400 + "}",
        "a number that a float can hold",
    ),
    "an empty object": ("{}", "neither a PEFT nor an MLX config"),
    "a model's config": ('{"model_type": "llama", "hidden_size": 8}', "neither a PEFT nor an MLX"),
    "AdapterHub": (
        '{"config": {"phm_dim": 4}, "model_name": "roberta", "model_type": "xlm"}',
        "AdapterHub",
    ),
}

MLX = {
    "full fine-tuning": ({"fine_tune_type": "full"}, "fine_tune_type is 'full'"),
    "no scale": ({"lora_parameters": {"rank": R}}, "need a rank and a scale"),
    "parameters as text": ({"lora_parameters": "no"}, "need a rank and a scale"),
    "another rank": ({"lora_parameters": {"rank": 9, "scale": 1.0}}, "rank 2, its config says 9"),
    "an unknown parameter": (
        {"lora_parameters": {"rank": R, "scale": 1.0, "wobble": 2}},
        "unknown lora_parameters wobble",
    ),
    "DoRA without magnitudes": ({"fine_tune_type": "dora"}, "has no magnitude"),
    "keys without updates": (
        {"lora_parameters": {"rank": R, "scale": 1.0, "keys": ["self_attn.o_proj"]}},
        "updates are for layers its config does not target",
    ),
    "an alpha of unknown meaning": ({"lora_layers": 16}, "before June and nothing after"),
}  # fmt: skip


def refused(path, message, **options):
    with pytest.raises(FormatError) as caught:
        peft.read(path, **options)
    text = str(caught.value)
    assert re.search(message, text), text
    assert "\n" not in text
    assert text.endswith(".")


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config(case, tmp_path):
    config, message = CONFIGS[case]
    refused(folder(tmp_path / "x", **config), message)


@pytest.mark.parametrize("case", TENSORS)
def test_tensors(case, tmp_path):
    tensors, message = TENSORS[case]
    refused(folder(tmp_path / "x", tensors), message)


@pytest.mark.parametrize("case", WEIGHTS)
def test_a_file_of_weights(case, tmp_path):
    content, message = WEIGHTS[case]
    refused(write(folder(tmp_path / "x"), "adapter_model.safetensors", content), message)


@pytest.mark.parametrize("case", CONFIG_FILES)
def test_a_file_of_config(case, tmp_path):
    content, message = CONFIG_FILES[case]
    refused(write(folder(tmp_path / "x"), "adapter_config.json", content), message)


@pytest.mark.parametrize("case", MLX)
def test_an_mlx_config(case, tmp_path):
    config, message = MLX[case]
    refused(layouts.mlx(tmp_path / "x", **config)[0], message)


PICKLES = {
    "cut short": (b"PK\x03\x04", "not a whole torch file"),
    "text": (b"hello world, no pickle", "weights_only|Python objects|torch file"),
    "a list": ([torch.ones(2)], "holds a list; expected tensors by name"),
    "a tensor": (torch.ones(2), "holds a Tensor; expected tensors by name"),
    "no tensors": ({"epoch": 3}, "no LoRA tensors but nothing"),
    "objects": ({"x": torch.nn.Linear(2, 2)}, "Python objects other than tensors"),
}


@pytest.mark.parametrize("suffix", PICKLE_SUFFIXES)
@pytest.mark.parametrize("case", PICKLES)
def test_a_pickle(case, suffix, tmp_path):
    content, message = PICKLES[case]
    file = tmp_path / f"x{suffix}"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    refused(file, "is a pickle; pass allow_pickle")
    refused(file, message, allow_pickle=True)


def test_folders_and_paths_that_hold_no_adapter(tmp_path):
    refused(tmp_path / "none", "does not exist")
    refused(tmp_path, r"no adapter_model.safetensors .*it holds nothing")
    write(tmp_path / "run", "trainer_state.json", "{}")
    (tmp_path / "run" / "checkpoint-500").mkdir()
    refused(tmp_path / "run", "give one of its checkpoint folders")
    save_file(peft_tensors(), write(tmp_path / "bare", "x", "") / "adapter_model.safetensors")
    refused(tmp_path / "bare", "has no adapter_config.json, so the scale .* is unknown")
    write(tmp_path / "alone", "adapter_config.json", json.dumps(CONFIG))
    refused(tmp_path / "alone", "has no adapter_model.safetensors")
    refused(write(tmp_path / "odd", "x.npz", "PK") / "x.npz", "of no kind read here")
    (tmp_path / "alone" / "adapter_model.safetensors").mkdir()
    refused(tmp_path / "alone", "cannot be opened")


def test_an_mlx_file_without_its_config_has_no_scale(tmp_path):
    path, _ = layouts.mlx(tmp_path / "x")
    (path / "adapter_config.json").unlink()
    refused(path / "adapters.safetensors", "an MLX file has its scale in adapter_config.json")


@pytest.mark.parametrize("case", ["an embedding", "a bias of B", "AdaLoRA", "NaN"])
def test_lora_only_never_leaves_out_a_part_of_an_update(case, tmp_path):
    tensors, message = TENSORS[case]
    refused(folder(tmp_path / "x", tensors), message, lora_only=True)
