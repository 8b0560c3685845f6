import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, BertModel

from loramix.base import Base, fingerprint, open_base
from loramix.errors import BaseError
from loramix.mixed import MixedModel
from tests.tiny import random_adapter, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny Llama as a folder."""
    folder = tmp_path_factory.mktemp("bases") / "tiny"
    tiny_model("llama", seed=1).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def damaged(saved, tmp_path):
    """A copy to break."""
    return shutil.copytree(saved, tmp_path / "tiny")


def refused(source, message, **options):
    with pytest.raises(BaseError, match=message) as caught:
        open_base(str(source), **options)
    assert "\n" not in str(caught.value)


def test_a_folder_is_opened_in_eval_mode(saved):
    base = open_base(str(saved), device="cpu")
    assert (base.id, base.dtype, base.device, base.context) == (
        "tiny",
        torch.float32,
        torch.device("cpu"),
        128,
    )
    assert not base.model.training
    tokens = torch.tensor([[7, 8, 9]])
    assert torch.equal(base.model(tokens).logits, tiny_model("llama", seed=1)(tokens).logits)


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "gpt_neox", "gemma3_text"])
def test_tied_and_untied_weights_are_whole(architecture, tmp_path):
    tiny_model(architecture).save_pretrained(tmp_path / "x")
    tiny_tokenizer().save_pretrained(tmp_path / "x")
    base = open_base(str(tmp_path / "x"), device="cpu")
    assert base.fingerprint == fingerprint(tiny_model(architecture))


def test_the_fingerprint_is_of_the_weights_as_stored(saved, tmp_path):
    bases = [
        open_base(str(saved), dtype=d, device="cpu") for d in ("float32", "float16", "bfloat16")
    ]
    assert [base.dtype for base in bases] == [torch.float32, torch.float16, torch.bfloat16]
    assert len({base.fingerprint for base in bases}) == 1
    other = tiny_model("llama", seed=2)
    assert fingerprint(other) != bases[0].fingerprint
    wider = tiny_model("llama", seed=1, intermediate_size=64)
    assert fingerprint(wider) != bases[0].fingerprint


def test_a_light_training_changes_the_fingerprint():
    model = tiny_model("llama")
    before = fingerprint(model)
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.02 * parameter.std().nan_to_num() * torch.randn_like(parameter)
    assert fingerprint(model) != before


def test_binding_adapters_keeps_the_fingerprint():
    model = tiny_model("llama")
    before = fingerprint(model)
    mixed = MixedModel(model)
    mixed.bind(random_adapter(model, "a"))
    assert fingerprint(model) == before


def test_paths_that_are_no_base(saved, tmp_path):
    refused("", "does not exist")
    refused(tmp_path / "none", "does not exist; give a folder, a hub id or 'pocket'")
    refused("./none", "does not exist")
    refused("a/b/c", "does not exist")
    refused(tmp_path, "has no config.json")
    refused(saved / "config.json", "is a file; give the folder")
    refused(saved, "revision is for hub ids only", revision="v1")
    refused(saved, "Unknown dtype 'float8'; expected auto, float32", dtype="float8")
    refused(saved, "No device 'tpu'", device="tpu")
    refused(saved, "No device 'cuda:99'", device="cuda:99")


def test_a_hub_id_that_is_not_there_is_one_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused("nobody/nothing", "Cannot open the base 'nobody/nothing'")


def test_a_truncated_file_of_weights(damaged):
    file = damaged / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(damaged, "Cannot open the base")


def test_no_weights_and_no_tokenizer(damaged):
    (damaged / "tokenizer.json").unlink()
    refused(damaged, "Cannot open the base")
    shutil.rmtree(damaged)
    damaged.mkdir()
    AutoConfig.for_model("llama").save_pretrained(damaged)
    tiny_tokenizer().save_pretrained(damaged)
    refused(damaged, "Cannot open the base")


def test_a_config_that_is_no_config(damaged):
    (damaged / "config.json").write_text("[]", "utf-8")
    refused(damaged, "Cannot open the base")
    (damaged / "config.json").write_text("{", "utf-8")
    refused(damaged, "Cannot open the base")
    (damaged / "config.json").write_text('{"model_type": "never-heard-of"}', "utf-8")
    refused(damaged, "Cannot open the base")


def test_weights_that_are_missing_are_never_made_up(damaged):
    file = damaged / "model.safetensors"
    tensors = load_file(file)
    gone = tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    refused(
        damaged, r"lack 1 tensors of LlamaForCausalLM \(first: model.layers.1.mlp.up_proj.weight\)"
    )
    tensors["model.layers.1.mlp.up_proj.weight"] = gone[:-1].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    refused(damaged, "Cannot open the base|lack 1 tensors")


def test_an_encoder_is_no_base(tmp_path):
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(**small, intermediate_size=32)).save_pretrained(tmp_path / "bert")
    tiny_tokenizer().save_pretrained(tmp_path / "bert")
    refused(tmp_path / "bert", "lack .* tensors of BertLMHeadModel")


def test_code_of_a_repository_is_never_run(damaged):
    config = json.loads((damaged / "config.json").read_text("utf-8"))
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}
    (damaged / "config.json").write_text(json.dumps(config), "utf-8")
    (damaged / "evil.py").write_text("raise SystemExit('ran')", "utf-8")
    refused(damaged, "needs code of its own, which is never run")


def test_a_base_without_a_context_length_says_so():
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("bloom", hidden_size=8, n_layer=1, n_head=1, vocab_size=300)
    )
    with pytest.raises(BaseError, match=r"b \(bloom\) states no context length"):
        _ = Base("b", model, tiny_tokenizer(), "").context
