"""A model in four bits: what is refused, and what comes out where the library is installed."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
import torch
from transformers import AutoModelForCausalLM

from loramix.chat import Example
from loramix.errors import FormatError
from loramix.formats import fourbit
from loramix.formats.folder import CARD, RECIPE
from loramix.formats.fourbit import write_four_bits
from tests.peft_twin import PROBE
from tests.tiny import tiny_base

ROWS = [Example.of("the thing " * n, "in there") for n in range(1, 9)]


def save(base, folder):
    base.model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    (folder / CARD).write_text('{"name": "both"}')
    (folder / RECIPE).write_text('{"mix": "a+b", "tensors": {"x": "1"}, "proof": {}}')
    return folder


@pytest.fixture
def there(monkeypatch):
    """As if the library were installed; only what is refused before it is called is tested."""
    monkeypatch.setattr(fourbit, "find_spec", lambda name: True)


@pytest.mark.skipif(find_spec("llmcompressor") is not None, reason="the library is here")
def test_without_the_library_it_is_said_what_it_needs(tmp_path):
    with pytest.raises(FormatError, match=r"another environment, pip install 'loramix\[gptq\]'"):
        write_four_bits("pocket", ROWS, tmp_path / "out", kind="gptq")


def test_what_cannot_be_rounded_is_refused(there, tmp_path):
    llama = str(save(tiny_base("llama"), tmp_path / "llama"))
    gpt2 = str(save(tiny_base("gpt2"), tmp_path / "gpt2"))
    with pytest.raises(FormatError, match="no multiple of 128; give a smaller --group-size"):
        write_four_bits(llama, ROWS, tmp_path / "out", kind="gptq")
    with pytest.raises(FormatError, match="stored transposed"):
        write_four_bits(gpt2, ROWS, tmp_path / "out", kind="gptq", group_size=16)
    long = [Example.of("x" * 200, "y")]
    with pytest.raises(FormatError, match="this model holds 128"):
        write_four_bits(llama, long, tmp_path / "out", kind="gptq", group_size=16)
    if not torch.accelerator.is_available():
        with pytest.raises(FormatError, match="awq needs a GPU"):
            write_four_bits(llama, ROWS, tmp_path / "out", kind="awq")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the library's own
@pytest.mark.parametrize("tied", [False, True])
def test_a_model_in_four_bits_is_nearly_itself(tied, tmp_path):
    """In an environment with the extra: pytest -m slow tests/formats/test_fourbit.py"""
    pytest.importorskip("llmcompressor")
    base = tiny_base("llama", tie_word_embeddings=tied)
    folder = save(base, tmp_path / "model")
    lost = write_four_bits(str(folder), ROWS, tmp_path / "out", kind="gptq", group_size=16)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert json.loads((tmp_path / "out" / RECIPE).read_text()) == {
        "mix": "a+b",
        "rounded": {"method": "gptq", "bits": 4, "group_size": 16},
    }
    p = base.model(PROBE).logits.log_softmax(-1)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    q = opened(PROBE).logits.float().log_softmax(-1)
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    assert 0 < kl < 0.2
    assert 0 < lost < 0.2
