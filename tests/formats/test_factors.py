"""Updates without factors: the error that is said is the error there is, and close to the least."""

from __future__ import annotations

import copy

import pytest
import torch

from loramix.adapter import Adapter
from loramix.cli import main
from loramix.errors import AdapterError, BaseMismatch, FormatError
from loramix.formats import peft
from loramix.formats.checkpoint import open_checkpoint
from loramix.formats.factors import closest, compressed, extract, without_dora
from loramix.formats.minlora import write_minlora
from loramix.mix import Mix
from tests.tiny import folded, random_adapter, tiny_model, tiny_tokenizer


def save(model, folder):
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return open_checkpoint(str(folder))


@pytest.mark.parametrize("shape", [(300, 200), (40, 500), (30, 20)])
def test_a_random_svd_is_nearly_the_best(shape):
    torch.manual_seed(1)
    noise = 0.05 * torch.randn(shape)
    delta = torch.randn(shape[0], 4) @ torch.randn(4, shape[1]) + noise
    before = torch.random.get_rng_state()
    pair, (lost, whole) = closest(delta, 4)
    best = torch.linalg.svdvals(delta)[4:].norm().item()
    assert lost == pytest.approx((delta - pair.delta()).norm().item(), rel=1e-4)
    assert best * (1 - 1e-4) <= lost <= 1.005 * best
    assert whole == pytest.approx(delta.norm().item())
    assert torch.equal(torch.random.get_rng_state(), before)
    exact, _ = closest(delta, 4, exact=True)
    assert (delta - exact.delta()).norm().item() == pytest.approx(best, rel=1e-3)
    with pytest.raises(AdapterError, match="at least 1"):
        closest(delta, 0)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_dora_as_a_lora(architecture, tmp_path):
    model = tiny_model(architecture)
    dora = random_adapter(model, "d", dora=True)
    base = save(model, tmp_path / "base")
    full = without_dora(dora, base, 200)
    tokens = torch.tensor([[7, 40, 90, 33, 120]])
    expected = folded(model, Mix({"d": 1}), {"d": dora})(tokens).logits
    plain = folded(model, Mix({"d": 1}), {"d": full.adapter})(tokens).logits
    assert full.error < 1e-5
    torch.testing.assert_close(plain, expected, atol=2e-4, rtol=0)
    small = without_dora(dora, base, 4)
    assert small.adapter.rank == 4
    assert all(pair.magnitude is None for pair in small.adapter.pairs.values())
    assert 0.05 < small.error <= small.worst[1] < 1
    other = save(tiny_model(architecture, **wider(architecture)), tmp_path / "other")
    with pytest.raises(BaseMismatch):
        without_dora(dora, other, 4)


def wider(architecture):
    return {"n_embd": 64} if architecture == "gpt2" else {"hidden_size": 64}


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_what_was_folded_in_is_extracted(architecture, tmp_path):
    model = tiny_model(architecture)
    adapter = random_adapter(model, "a", rank=3, share=0.6)
    tuned = folded(model, Mix({"a": 1}), {"a": adapter})
    base, whole = save(model, tmp_path / "base"), save(tuned, tmp_path / "tuned")
    found = extract(whole, base, 3, "again")
    assert found.error < 1e-5
    assert found.adapter.pairs.keys() == adapter.pairs.keys()
    for layer, pair in adapter.pairs.items():
        torch.testing.assert_close(
            found.adapter.pairs[layer].delta(), pair.delta(), atol=1e-5, rtol=0
        )
    assert 0 < extract(whole, base, 2, "less").error < 1
    with pytest.raises(AdapterError, match="same linear layers"):
        extract(base, base, 3, "none")


def test_what_an_adapter_cannot_hold_is_named(tmp_path):
    model = tiny_model("llama")
    tuned = copy.deepcopy(model)
    tuned.model.norm.weight.data += 1
    tuned.model.layers[0].mlp.up_proj.weight.data += 1
    base, whole = save(model, tmp_path / "base"), save(tuned, tmp_path / "tuned")
    with pytest.raises(AdapterError, match=r"more than linear layers: model\.norm\.weight"):
        extract(whole, base, 2, "a")
    found = extract(whole, base, 2, "a", lora_only=True)
    assert list(found.adapter.pairs) == ["model.layers.0.mlp.up_proj"]
    other = save(tiny_model("llama", hidden_size=64), tmp_path / "other")
    with pytest.raises(BaseMismatch, match="different tensors or shapes"):
        extract(other, base, 2, "a")


def test_compressing_says_what_is_lost():
    adapter = random_adapter(tiny_model("llama"), "a", rank=6)
    small = compressed(adapter, 2)
    lost = sum((p.delta() - small.adapter.pairs[n].delta()).norm() ** 2 for n, p in pairs(adapter))
    whole = sum(pair.delta().norm() ** 2 for _, pair in pairs(adapter))
    assert small.adapter.rank == 2
    assert small.error == pytest.approx((lost / whole).sqrt().item(), rel=1e-4)
    assert compressed(adapter, 6).error == 0


def pairs(adapter: Adapter):
    return adapter.pairs.items()


def test_minlora_there_and_back(tmp_path):
    adapter = random_adapter(tiny_model("llama"), "a", rank=4)
    write_minlora(adapter, tmp_path / "a.pt")
    again = peft.read(tmp_path / "a.pt", allow_pickle=True)
    assert again.digest == peft.digest(adapter.pairs)
    with pytest.raises(FormatError, match="no DoRA"):
        write_minlora(random_adapter(tiny_model("llama"), "a", dora=True), tmp_path / "b.pt")
    assert not (tmp_path / "b.pt").exists()


def test_the_command(tmp_path, capsys):
    model = tiny_model("llama")
    save(model, tmp_path / "base")
    peft.write(random_adapter(model, "d", dora=True), tmp_path / "dora")
    peft.write(random_adapter(model, "p", rank=8), tmp_path / "plain")
    save(folded(model, Mix({"d": 1}), {"d": peft.read(tmp_path / "dora")}), tmp_path / "tuned")
    base = ["--base", str(tmp_path / "base"), "--rank", "4"]
    for source, out in [("dora", "a"), ("plain", "b.gguf"), ("tuned", "c"), ("plain", "d.pt")]:
        assert main(["convert", str(tmp_path / source), str(tmp_path / out), *base]) == 0
        assert "Off by" in capsys.readouterr().err
    assert peft.read(tmp_path / "a").rank == peft.read(tmp_path / "c").rank == 4
    assert peft.read(tmp_path / "d.pt", allow_pickle=True).rank == 4
    for words, message in [
        (("tuned", "x"), "give NAME.gguf, or --base and --rank"),
        (("plain", "x", "--exact"), "--exact says how a --rank"),
        (("plain", "x", "--lora-only"), "--lora-only is for"),
        (("dora", "x", "--rank", "4"), "give --base"),
        (("plain", "x", "--rank", "0"), "rank is at least 1"),
    ]:
        paths = [str(tmp_path / word) if not word.startswith("-") else word for word in words[:2]]
        assert main(["convert", *paths, *words[2:]]) == 1, words
        assert message in capsys.readouterr().err, words
        assert not (tmp_path / "x").exists()
