import dataclasses
import json
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from loramix.adapter import Adapter, Card
from loramix.errors import AdapterError, FormatError, MixSyntaxError
from loramix.formats import peft
from loramix.lora import Pair
from tests.formats import layouts
from tests.formats.layouts import LAYERS, OUT, D, R, factors, folder, peft_tensors
from tests.peft_twin import load_in_peft, save_twin
from tests.tiny import tiny_model

ANYTHING = {"allow_pickle": True, "lora_only": True}


@pytest.mark.parametrize("layout", layouts.EXACT)
def test_every_layout_means_scale_times_b_a(layout, tmp_path):
    path, scale = layout(tmp_path / "twin")
    adapter = peft.read(path, **ANYTHING)
    assert adapter.pairs.keys() == {*LAYERS}
    for layer, (a, b) in factors().items():
        torch.testing.assert_close(adapter.pairs[layer].delta(), scale * (b @ a))
        assert adapter.pairs[layer].a.shape == (R, D)
        assert adapter.pairs[layer].b.shape == (OUT, R)


@pytest.mark.parametrize("layout", layouts.EXACT)
def test_every_layout_is_byte_stable_once_written(layout, tmp_path):
    adapter = peft.read(layout(tmp_path / "twin")[0], **ANYTHING)
    peft.write(adapter, tmp_path / "one")
    again = peft.read(tmp_path / "one", name=adapter.name)
    peft.write(again, tmp_path / "two")
    assert again == dataclasses.replace(adapter, pairs=again.pairs)
    files = ["adapter_config.json", "adapter_model.safetensors"]
    assert sorted(file.name for file in (tmp_path / "one").iterdir()) == files
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


@settings(max_examples=30, deadline=None)
@given(
    ranks=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    dtype=st.sampled_from(peft.DTYPES),
    dora=st.booleans(),
    seed=st.integers(0, 99),
)
def test_write_then_read_is_the_identity(ranks, dtype, dora, seed, tmp_path_factory):
    torch.manual_seed(seed)
    pairs = {
        f"model.layers.{i}.q_proj": Pair(
            torch.randn(rank, D).to(dtype),
            torch.randn(OUT, rank).to(dtype),
            torch.rand(OUT).to(dtype) if dora else None,
        )
        for i, rank in enumerate(ranks)
    }
    adapter = Adapter("mine", pairs, peft.digest(pairs), Card("mine", base="tiny/llama"))
    place = tmp_path_factory.mktemp("written") / "mine"
    peft.write(adapter, place)
    again = peft.read(place)
    assert (again.digest, again.card) == (adapter.digest, adapter.card)
    for layer, pair in pairs.items():
        assert torch.equal(again.pairs[layer].b, pair.b)
        assert again.pairs[layer].b.dtype == dtype


def test_files_that_act_alike_share_a_digest(tmp_path):
    halved = {k: v / 2 if "lora_B" in k else v for k, v in peft_tensors().items()}
    alike = [
        folder(tmp_path / "one", lora_alpha=2),
        folder(tmp_path / "two", halved, lora_alpha=4, lora_dropout=0.5),
        folder(tmp_path / "three", peft_tensors(".default"), r=1, rank_pattern={".*": 2},
               alpha_pattern={"[qv]_proj": 2}),
    ]  # fmt: skip
    assert len({peft.read(path).digest for path in alike}) == 1
    others = [folder(tmp_path / "four", lora_alpha=3), folder(tmp_path / "five", use_rslora=True)]
    assert len({peft.read(path).digest for path in [alike[0], *others]}) == 3
    bf16 = {key: tensor.bfloat16() for key, tensor in peft_tensors().items()}
    assert (
        peft.read(folder(tmp_path / "six", bf16, lora_alpha=2)).digest != peft.read(alike[0]).digest
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_precision_is_kept_where_the_scaled_update_fits_it(dtype, tmp_path):
    tensors = {key: tensor.to(dtype) for key, tensor in peft_tensors().items()}
    fits = peft.read(folder(tmp_path / "fits", tensors, lora_alpha=8 * R))
    grows = peft.read(folder(tmp_path / "grows", tensors, lora_alpha=3))
    for layer, (a, b) in factors().items():
        exact = b.to(dtype).float() @ a.to(dtype).float()
        assert fits.pairs[layer].a.dtype == fits.pairs[layer].b.dtype == dtype
        assert torch.equal(fits.pairs[layer].to(torch.float32).delta(), 8 * exact)
        assert grows.pairs[layer].a.dtype == grows.pairs[layer].b.dtype == torch.float32
        torch.testing.assert_close(grows.pairs[layer].delta(), 1.5 * exact)


def test_a_dtype_can_be_written(tmp_path):
    adapter = peft.read(folder(tmp_path / "in"))
    peft.write(adapter, tmp_path / "out", dtype=torch.bfloat16)
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}


def test_patterns_choose_rank_and_alpha_by_layer(tmp_path):
    tensors = peft_tensors()
    tensors[f"base_model.model.{LAYERS[1]}.lora_A.weight"] = torch.randn(5, D)
    tensors[f"base_model.model.{LAYERS[1]}.lora_B.weight"] = b = torch.randn(OUT, 5)
    config = {"rank_pattern": {"v_proj": 5}, "alpha_pattern": {r"layers\.0.*": 7}}
    for rslora in (False, True):
        path = folder(tmp_path / str(rslora), tensors, **config, use_rslora=rslora)
        adapter = peft.read(path, name="x")
        five, two = (math.sqrt(5), math.sqrt(2)) if rslora else (5, 2)
        torch.testing.assert_close(adapter.pairs[LAYERS[1]].b, b * 3 / five)
        torch.testing.assert_close(adapter.pairs[LAYERS[0]].b, factors()[LAYERS[0]][1] * 7 / two)
        peft.write(adapter, tmp_path / f"{rslora}-out")
        assert peft.read(tmp_path / f"{rslora}-out", name="x").digest == adapter.digest


@pytest.mark.parametrize("suffix", ["", ".weight", ".default", ".default.weight"])
def test_a_magnitude_is_found_under_its_old_and_new_names(suffix, tmp_path):
    magnitude = {
        f"base_model.model.{n}.lora_magnitude_vector{suffix}": torch.rand(OUT) for n in LAYERS
    }
    infix = ".default" if "default" in suffix else ""
    path = folder(tmp_path / "dora", peft_tensors(infix) | magnitude, use_dora=True)
    adapter = peft.read(path)
    for layer in LAYERS:
        expected = magnitude[f"base_model.model.{layer}.lora_magnitude_vector{suffix}"]
        assert torch.equal(adapter.pairs[layer].magnitude, expected)
    peft.write(adapter, tmp_path / "out")
    assert peft.read(tmp_path / "out", name="dora").digest == adapter.digest


def test_an_mlx_dora_has_its_magnitude_in_m(tmp_path):
    path, _ = layouts.mlx(tmp_path / "mlx", fine_tune_type="dora")
    tensors = load_file(path / "adapters.safetensors")
    save_file(
        tensors | {f"{n}.m": torch.full((OUT,), 2.0) for n in LAYERS}, path / "adapters.safetensors"
    )
    adapter = peft.read(path)
    assert all(torch.equal(p.magnitude, torch.full((OUT,), 2.0)) for p in adapter.pairs.values())


@pytest.mark.parametrize("enabled", [[True, False, True], [True, True, True], [False, True]])
def test_a_merged_linear_is_its_grouped_convolution(enabled, tmp_path):
    """The forward of loralib's layer, written out: conv1d by groups, then zero padding."""
    groups, part, rank = sum(enabled), 5, 3
    a, b = torch.randn(rank * groups, D), torch.randn(part * groups, rank, 1)
    layer = "transformer.h.0.query_key_value"
    tensors = {
        f"base_model.model.{layer}.lora_{p}.weight": t for p, t in zip("AB", (a, b), strict=True)
    }
    path = folder(tmp_path / "merged", tensors, r=rank, lora_alpha=6, enable_lora=enabled,
                  target_modules=["query_key_value"], fan_in_fan_out=True)  # fmt: skip
    x = torch.randn(7, D)
    convolved = F.conv1d((x @ a.T).T[None], b, groups=groups)[0].T
    expected = torch.zeros(7, part * len(enabled))
    expected[:, torch.tensor(enabled).repeat_interleave(part)] = convolved * 6 / rank
    pair = peft.read(path).pairs[layer]
    torch.testing.assert_close(x @ pair.delta().T, expected)


def test_eva_leaves_its_base_alone_so_it_is_plain_lora(tmp_path):
    model = tiny_model()
    expected = save_twin(model, tmp_path / "eva", target_modules=["q_proj"])
    file = tmp_path / "eva" / "adapter_config.json"
    config = json.loads(file.read_text("utf-8")) | {
        "init_lora_weights": "eva",
        "eva_config": {"rho": 2.0},
    }
    file.write_text(json.dumps(config), "utf-8")
    torch.testing.assert_close(load_in_peft(model, tmp_path / "eva"), expected)
    assert peft.read(tmp_path / "eva").rank == 4


def test_lora_only_says_what_it_leaves_out(tmp_path):
    path, _ = layouts.checkpoint(tmp_path / "run")
    with pytest.raises(
        FormatError, match=r"holds more than LoRA: the wrapper 'state_dict'.*lora_only"
    ):
        peft.read(path, allow_pickle=True)
    told = []
    peft.read(path, **ANYTHING, report=told.append)
    for word in ("embed_tokens", "lm_head", "base_layer", "optimizer", "epoch"):
        assert word in told[0]


def test_lora_only_leaves_out_whole_modules_of_a_peft_folder(tmp_path):
    head = {"base_model.model.lm_head.weight": torch.randn(9, D)}
    path = folder(tmp_path / "x", peft_tensors() | head, modules_to_save=["lm_head"])
    with pytest.raises(FormatError, match="modules_to_save is lm_head"):
        peft.read(path)
    told = []
    assert peft.read(path, lora_only=True, report=told.append).pairs.keys() == {*LAYERS}
    assert "lm_head" in told[0]


def test_what_is_assumed_is_told(tmp_path):
    told = []
    peft.read(layouts.lone_file(tmp_path / "a")[0], allow_pickle=True, report=told.append)
    peft.read(layouts.minlora(tmp_path / "b")[0], allow_pickle=True, report=told.append)
    assert ["alpha = r" in told[0], "default of 1" in told[1]] == [True, True]


def test_an_adapter_is_called_after_its_folder_or_file(tmp_path):
    path = folder(tmp_path / "My Adapter")
    assert peft.read(path).name == "my-adapter"
    assert peft.read(path / "adapter_model.safetensors").name == "my-adapter"
    assert peft.read(layouts.loralib(tmp_path / "x")[0]).name == "lone"
    assert peft.read(path, name="sql").card == Card("sql", base="tiny/llama")
    with pytest.raises(MixSyntaxError):
        peft.read(path, name="123")


def test_nothing_is_overwritten_or_half_written(tmp_path, monkeypatch):
    adapter = peft.read(folder(tmp_path / "in"))
    (tmp_path / "taken").mkdir()
    with pytest.raises(AdapterError, match="exists"):
        peft.write(adapter, tmp_path / "taken")
    monkeypatch.setattr(peft, "_config", lambda adapter: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        peft.write(adapter, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "taken"]


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(peft, "save_file", full)
    with pytest.raises(AdapterError, match=r"Cannot write .*No space left"):
        peft.write(peft.read(folder(tmp_path / "in")), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_layers_may_share_a_tensor(tmp_path):
    a, b = torch.randn(2, 4), torch.randn(4, 2)
    pairs = {name: Pair(a, b) for name in ("l.q", "l.k")}
    peft.write(Adapter("x", pairs, peft.digest(pairs), Card("x")), tmp_path / "x")
    assert peft.read(tmp_path / "x").digest == peft.digest(pairs)


def test_a_pickle_runs_nothing(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "boom"), "w"))

    torch.save({"x": Bomb()}, tmp_path / "bomb.pt")
    with pytest.raises(FormatError, match="Python objects other than tensors"):
        peft.read(tmp_path / "bomb.pt", allow_pickle=True)
    assert not (tmp_path / "boom").exists()


def test_reading_warns_of_nothing(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for layout in layouts.EXACT:
            peft.read(layout(tmp_path / layout.__name__)[0], **ANYTHING)
