import dataclasses
import json
import shutil
import subprocess
import sys

import pytest
import torch

from loramix.adapter import Card
from loramix.errors import AdapterError, BaseMismatch, FormatError, MixSyntaxError, UnknownAdapter
from loramix.formats import peft
from loramix.formats.card import read_card, write_card
from loramix.library import Check, Library, check
from loramix.lora import Pair
from tests.formats import layouts
from tests.formats.layouts import factors, folder
from tests.tiny import random_adapter, tiny_base


@pytest.mark.parametrize("name", ["sql", "", ".", "..", "_router", ".sql", "a/sql", "../sql", "no"])
def test_a_name_is_in_a_library_as_its_names_say(tmp_path, name):
    for place in ("sql", "_router", ".sql", "a/sql"):
        (tmp_path / "library" / place).mkdir(parents=True)
    library = Library(tmp_path / "library")
    assert (name in library) == (name in library.names()) == (name == "sql")


def test_one_adapter_is_found_without_looking_at_the_others(library, monkeypatch):
    monkeypatch.delattr(Library, "names")
    assert library.card("sql").name == library.load("sql").name == "sql"


@pytest.fixture
def library(tmp_path):
    """A library of one adapter, `sql`."""
    library = Library(tmp_path / "library")
    library.add(folder(tmp_path / "sql"))
    return library


def snapshot(library):
    return {
        str(path.relative_to(library.folder)): path.read_bytes() if path.is_file() else None
        for path in library.folder.rglob("*")
    }


def test_what_is_added_is_a_clean_copy(library, tmp_path):
    assert library.names() == ["sql"]
    shutil.rmtree(tmp_path / "sql")
    adapter = library.load("sql")
    for layer, (a, b) in factors().items():
        torch.testing.assert_close(adapter.pairs[layer].delta(), 1.5 * (b @ a))
    assert library.cards() == [Card("sql", base="tiny/llama")]
    assert library.card("sql") == library.cards()[0]
    files = ["adapter_config.json", "adapter_model.safetensors", "card.json"]
    assert sorted(path.name for path in library.path("sql").iterdir()) == files


@pytest.mark.parametrize("layout", layouts.EXACT)
def test_every_layout_can_be_added(layout, tmp_path):
    library = Library(tmp_path / "library")
    path, _ = layout(tmp_path / "source")
    card = library.add(path, name="it", allow_pickle=True, lora_only=True)
    expected = peft.read(path, name="it", allow_pickle=True, lora_only=True)
    found = library.load("it")
    assert (found.name, found.digest, found.card) == ("it", expected.digest, expected.card)
    assert card == library.card("it") == found.card


def test_a_card_comes_along_under_the_new_name(library, tmp_path):
    source = folder(tmp_path / "other")
    card = Card("other", description="rows to poems", examples=("a poem?",), scores={"exact": 0.5})
    write_card(card, source)
    assert library.add(source, name="poems") == dataclasses.replace(card, name="poems")
    assert read_card(library.path("poems")).description == "rows to poems"


def test_a_name_is_taken_once_unless_replaced(library, tmp_path):
    before = snapshot(library)
    other = folder(tmp_path / "other", lora_alpha=9)
    with pytest.raises(AdapterError, match="has an adapter 'sql' already"):
        library.add(other, name="sql")
    assert snapshot(library) == before
    digest = library.load("sql").digest
    library.add(other, name="sql", replace=True)
    assert library.load("sql").digest != digest
    assert library.names() == ["sql"]
    assert [path.name for path in library.folder.iterdir()] == ["sql"]


def test_removed_is_gone(library):
    library.remove("sql")
    assert library.names() == []
    assert [*library.folder.iterdir()] == []
    with pytest.raises(UnknownAdapter, match="No adapter 'sql'"):
        library.remove("sql")
    with pytest.raises(UnknownAdapter):
        library.load("sql")


@pytest.mark.parametrize("name", ["_router", "..", ".", "", "../sql", "/etc", "SQL", "1"])
def test_no_name_leaves_the_library(library, name, tmp_path):
    before = snapshot(library)
    for use in (library.path, library.load, library.remove, library.card):
        with pytest.raises(UnknownAdapter):
            use(name)
    with pytest.raises(MixSyntaxError):
        library.put(dataclasses.replace(library.load("sql"), name=name))
    assert snapshot(library) == before
    assert (tmp_path / "sql").is_dir()


@pytest.mark.parametrize("name", ["llama", "tiny-llama", "pocket"])
def test_an_adapter_is_not_called_like_a_base(library, name, tmp_path):
    before = snapshot(library)
    with pytest.raises(AdapterError, match=f"{name!r} is the name of a base"):
        library.add(tmp_path / "sql", name=name)
    assert snapshot(library) == before


def test_a_failed_add_leaves_nothing(library, tmp_path, monkeypatch):
    before = snapshot(library)
    bad = {"base_model.model.l.lora_A.weight": torch.ones(2, 2)}
    sources = {
        folder(tmp_path / "bad", bad): FormatError,
        tmp_path / "none": AdapterError,
        "no/such/thing": AdapterError,
    }
    for source, error in sources.items():
        with pytest.raises(error):
            library.add(source, name="x")
    with pytest.raises(AdapterError, match="a revision is for hub ids only"):
        library.add(tmp_path / "sql", name="x", revision="v1")
    monkeypatch.setattr("loramix.library.write_card", lambda card, place: 1 / 0)
    for name, replace in (("x", False), ("sql", True)):
        with pytest.raises(ZeroDivisionError):
            library.add(tmp_path / "sql", name=name, replace=replace)
    assert snapshot(library) == before


def test_a_hub_id_is_fetched_and_slugged(library, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "loramix.library.fetch", lambda *words: asked.append(words) or tmp_path / "sql"
    )
    assert library.add("Some-Org/My_Adapter", revision="v1").name == "some-org-my_adapter"
    assert asked == [("Some-Org/My_Adapter", "v1")]


def test_a_damaged_folder_is_named_and_the_others_are_listed(library, tmp_path):
    for name in ("no-card", "no-weights", "bad-card", "bad-config", "empty"):
        shutil.copytree(library.path("sql"), library.folder / name)
    (library.folder / "no-card" / "card.json").unlink()
    (library.folder / "no-weights" / "adapter_model.safetensors").unlink()
    (library.folder / "bad-card" / "card.json").write_text("{", "utf-8")
    (library.folder / "bad-config" / "adapter_config.json").write_text("[]", "utf-8")
    shutil.rmtree(library.folder / "empty")
    (library.folder / "empty").mkdir()
    (library.folder / "No Name").mkdir()
    (library.folder / "_router").mkdir()
    (library.folder / "readme.txt").write_text("hello", "utf-8")
    assert [card.name for card in library.cards()] == ["no-card", "sql"]
    damaged = library.damaged()
    assert sorted(damaged) == ["No Name", "bad-card", "bad-config", "empty", "no-weights"]
    for name, line in damaged.items():
        assert name in line
        assert "\n" not in line
        with pytest.raises((FormatError, MixSyntaxError)):
            library.load(name)
    assert library.load("no-card").card.base == "tiny/llama"


def test_a_library_need_not_exist_yet_but_is_no_file(tmp_path):
    library = Library(tmp_path / "a" / "b")
    assert (library.names(), library.cards(), library.damaged()) == ([], [], {})
    library.add(folder(tmp_path / "sql"))
    assert library.names() == ["sql"]
    (tmp_path / "file").write_text("x", "utf-8")
    with pytest.raises(AdapterError, match="is a file"):
        Library(tmp_path / "file")


def test_listing_loads_no_torch(library):
    code = f"""
import sys
from loramix.library import Library
library = Library({str(library.folder)!r})
assert [card.name for card in library.cards()] == ["sql"], library.damaged()
assert not {{"torch", "transformers", "huggingface_hub", "numpy"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": "src"})


# --- check --------------------------------------------------------------------------------------


def test_check_measures_the_change_of_weights_and_of_words():
    base = tiny_base()
    before = dict(base.model.named_modules())
    adapter = random_adapter(base.model, "a", share=0.7)
    found = check(adapter, base)
    assert isinstance(found, Check)
    for layer, pair in adapter.pairs.items():
        weight = base.model.get_submodule(layer).weight
        expected = (pair.delta().norm() / weight.norm()).item()
        assert found.norms[layer] == pytest.approx(expected, rel=1e-5)
    assert min(found.norms.values()) <= found.norm <= max(found.norms.values())
    assert 0 < found.mean_kl < found.max_kl
    assert dict(base.model.named_modules()) == before
    assert check(adapter, base) == found


@pytest.mark.parametrize("architecture", ["gpt2", "phi3"])
def test_check_knows_dora_and_conv1d(architecture):
    base = tiny_base(architecture)
    adapter = random_adapter(base.model, "a", dora=True)
    assert check(adapter, base).mean_kl > 0


def test_a_smaller_adapter_changes_less():
    base = tiny_base()
    large = random_adapter(base.model, "a")
    small = scaled(large, 0.01)
    found, less = check(large, base), check(small, base)
    assert less.norm == pytest.approx(0.01 * found.norm, rel=1e-4)
    assert less.mean_kl < 0.01 * found.mean_kl


def scaled(adapter, factor):
    pairs = {layer: Pair(p.a, factor * p.b) for layer, p in adapter.pairs.items()}
    return dataclasses.replace(adapter, pairs=pairs)


def test_an_adapter_that_changes_no_logit_is_an_error():
    base = tiny_base()
    adapter = random_adapter(base.model, "a")
    for factor in (0.0, 1e-12):
        with pytest.raises(AdapterError, match="changes no logit of tiny-llama"):
            check(scaled(adapter, factor), base)


def test_an_adapter_that_breaks_the_logits_is_an_error():
    base = tiny_base()
    with pytest.raises(AdapterError, match="makes NaN"):
        check(scaled(random_adapter(base.model, "a"), 1e38), base)


def test_an_adapter_of_another_base_is_an_error_and_leaves_no_trace():
    base = tiny_base("llama")
    before = dict(base.model.named_modules())
    with pytest.raises(BaseMismatch, match="find no linear layer"):
        check(random_adapter(tiny_base("gpt2").model, "a"), base)
    adapter = random_adapter(base.model, "a")
    card = dataclasses.replace(adapter.card, base="pocket", base_fingerprint="0" * 16)
    with pytest.raises(BaseMismatch, match="trained on pocket with fingerprint 0000"):
        check(dataclasses.replace(adapter, card=card), base)
    card = dataclasses.replace(card, base_fingerprint=base.fingerprint)
    assert check(dataclasses.replace(adapter, card=card), base).norm > 0
    assert dict(base.model.named_modules()) == before


def test_an_adapter_keeps_its_precision_until_it_is_bound(tmp_path):
    base = tiny_base()
    adapter = random_adapter(base.model, "a")
    peft.write(adapter, tmp_path / "a", dtype=torch.bfloat16)
    small = peft.read(tmp_path / "a")
    assert {pair.a.dtype for pair in small.pairs.values()} == {torch.bfloat16}
    assert check(small, base).norm == pytest.approx(check(adapter, base).norm, rel=1e-2)


def test_a_check_is_plain_data():
    base = tiny_base()
    found = check(random_adapter(base.model, "a"), base)
    assert json.loads(json.dumps(dataclasses.asdict(found)))["norm"] == found.norm
