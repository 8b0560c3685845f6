"""Every real adapter and config at hand has its expected outcome; none is skipped one by one.

They may not be redistributed, so they are read where they are present. layouts.py has a twin of
every layout among them, which is tested everywhere.
"""

import json
import re

import pytest
import torch

from loramix.errors import FormatError
from loramix.formats import peft
from loramix.formats.config import interpret, load_config
from loramix.formats.weights import open_weights

ADAPTERS = {  # number of updates, rank, scale, base
    "bloom560m_enable_lora_bin": (24, 16, 2.0, "bigscience/bloom-560m"),
    "distilgpt2_groundup": (6, 8, 2.0, "distilgpt2"),
    "gemma3_270m_logo": (36, 4, 1.0, "google/gemma-3-270m-it"),
    "gpt2_demo": (12, 8, 2.0, "gpt2"),
    "gptneo125m_movies": (24, 8, 2.0, "EleutherAI/gpt-neo-125M"),
    "mlx_qwen25_05b": (8, 8, 10.0, "Qwen2.5-0.5B-Instruct"),
    "opencalm1b_r1_fp16": (24, 1, 32.0, "cyberagent/open-calm-1b"),
    "opt125m_bf16": (24, 16, 2.0, "facebook/opt-125m"),
    "qwen25_05b_instruct": (48, 8, 2.0, "Qwen/Qwen2.5-0.5B-Instruct"),
}
NO_ADAPTERS = {
    "adapterhub_compacter_bin": "an AdapterHub adapter, not a LoRA",
    "lfs_pointer_config": "adapter_config.json is a git-LFS pointer",
    "lfs_pointer_only": "adapter_model.safetensors is a git-LFS pointer",
    "prompt_tuning_bloom_bin": "an adapter of type PROMPT_TUNING, not LORA",
}

SCALES = {  # of a layer no pattern names, and the configs that ask for it
    0.25: "010 030 054",
    0.5: "004 036",
    1.0: "006 018 040 188",
    2.0: "002 014 022 024 032 034 038 042 044 064 076 078 080 088 092 098 106 108 110 146 148 214",
    4.0: "012 016 020 060 062 070",
    8.0: "090",
    10.0: "058 074 112 114",
    20.0: "008 066 082",
}
HONOURED = {number: scale for scale, text in SCALES.items() for number in text.split()}
REFUSALS = {  # what the message says, and of which configs
    "trained for SEQ_CLS": "026 028 046 048 084 086 096 100 102 104",
    "trained for GPT2ForSequenceClassification": "072",
    "trained for FEATURE_EXTRACTION": "056",
    "trained for SEQ_2_SEQ_LM": "094",
    "git-LFS pointer": "050 052",
    "alpha 256 beside rank 128": "068",
    "use_bdlora is set": "142",
    "kasa_config is set": "144 200",
    "an adapter of type [A-Z0-9_]+, not LORA": """116 118 120 122 124 126 128 130 132 134 136 138
        140 150 152 154 156 158 160 162 164 166 168 170 172 174 176 178 180 182 184 186 190 192 194
        196 198 202 204 206 208 210 212""",
}
REFUSED = {number: message for message, text in REFUSALS.items() for number in text.split()}


def test_the_tables_name_every_file(data_dir):
    folders = {path.name for path in (data_dir / "adapters").iterdir() if path.is_dir()}
    assert folders == ADAPTERS.keys() | NO_ADAPTERS.keys()
    numbers = {path.name[:3] for path in (data_dir / "adapter_configs").glob("*.json")}
    assert numbers == HONOURED.keys() | REFUSED.keys()
    assert not HONOURED.keys() & REFUSED.keys()


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_real_adapter_is_read_and_written_back(name, data_dir, tmp_path):
    path = data_dir / "adapters" / name
    num_updates, rank, scale, base = ADAPTERS[name]
    adapter = peft.read(path, allow_pickle=name.endswith("_bin"))
    assert (len(adapter.pairs), adapter.rank, adapter.card.base) == (num_updates, rank, base)
    if "enable_lora" not in name:
        dtypes = {name: tensor.dtype for name, tensor in raw(path).items()}
        assert {pair.a.dtype for pair in adapter.pairs.values()} == {*dtypes.values()}
        for layer, pair in adapter.pairs.items():
            x = torch.randn(pair.a.shape[1], 2, dtype=torch.float64)
            got = pair.b.double() @ (pair.a.double() @ x)
            torch.testing.assert_close(got, scale * updated(path, layer, x))
    peft.write(adapter, tmp_path / "out")
    assert peft.read(tmp_path / "out").digest == adapter.digest


@pytest.mark.parametrize("name", NO_ADAPTERS)
def test_a_real_folder_of_something_else_is_refused(name, data_dir):
    with pytest.raises(FormatError, match=NO_ADAPTERS[name]):
        peft.read(data_dir / "adapters" / name, allow_pickle=True, lora_only=True)


def test_the_two_checkpoints_of_one_mlx_run_are_read_alike(data_dir):
    folder = data_dir / "adapters" / "mlx_qwen25_05b"
    last, early = peft.read(folder), peft.read(folder / "0000100_adapters.safetensors")
    assert last.pairs.keys() == early.pairs.keys()


def test_the_merged_linear_has_zeros_for_the_keys(data_dir):
    """enable_lora [true, false, true]: the middle third of the fused projection is untouched."""
    adapter = peft.read(data_dir / "adapters" / "bloom560m_enable_lora_bin", allow_pickle=True)
    for pair in adapter.pairs.values():
        q, k, v = pair.b.chunk(3)
        assert (pair.b.shape, pair.a.shape) == ((3072, 16), (16, 1024))
        assert q[:, :8].any()
        assert v[:, 8:].any()
        assert not torch.cat([k.flatten(), q[:, 8:].flatten(), v[:, :8].flatten()]).any()


def test_every_real_config_has_its_outcome(data_dir):
    rows = (data_dir / "adapter_configs" / "index.jsonl").read_text("utf-8").splitlines()
    index = {row["file"]: row for row in map(json.loads, rows)}
    for file in sorted((data_dir / "adapter_configs").glob("*.json")):
        number = file.name[:3]
        if number in REFUSED:
            with pytest.raises(FormatError) as caught:
                interpret(load_config(file), str(file))
            assert re.search(REFUSED[number], str(caught.value)), (number, caught.value)
            continue
        found = interpret(load_config(file), str(file))
        assert found.rank == (index[file.name]["r"] or load_config(file)["lora_parameters"]["rank"])
        assert found.scale("model.layers.0.x", found.rank, "") == HONOURED[number], number
        assert found.base in (index[file.name]["base"] or "")


def raw(path):
    return open_weights(next(path.glob("adapter*.safetensors"))).tensors


def updated(path, layer, x):
    """B A x in float64, straight from the file."""
    tensors = raw(path)
    if f"{layer}.lora_a" in tensors:
        a, b = tensors[f"{layer}.lora_a"].T, tensors[f"{layer}.lora_b"].T
    else:
        a, b = (tensors[f"base_model.model.{layer}.lora_{part}.weight"] for part in "AB")
    return b.double() @ (a.double() @ x)
