"""README.md of what is published: front matter the hub can read, commands that exist."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shlex

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from loramix.adapter import Card
from loramix.cli import main
from loramix.errors import FormatError
from loramix.formats.card import write_card
from loramix.formats.licences import TIERS, strictest
from loramix.formats.readme import describe, render
from tests.formats.layouts import LAYERS, folder

CARD = Card(
    "sql",
    "Writes SQL.",
    ("sql", "tables"),
    ("list all singers",),
    0.8,
    "tiny/llama",
    "0123456789abcdef",
    "CC-BY-4.0",
    {"exact": 0.95},
)


def published(place, card=CARD, **options):
    folder(place)
    write_card(card, place)
    return describe(place, **options)


def matter(text):
    return yaml.safe_load(text.split("---\n")[1])


def test_an_adapter_says_what_it_is_of(tmp_path):
    text = render(published(tmp_path / "sql", datasets=["me/rows"]))
    assert matter(text) == {
        "base_model": "tiny/llama",
        "base_model_relation": "adapter",
        "license": "cc-by-4.0",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["loramix", "lora"],
        "datasets": ["me/rows"],
    }
    assert "--max-lora-rank 8 " in text
    large = dict.fromkeys(LAYERS, 40)
    folder(tmp_path / "large", rank_pattern=large, alpha_pattern=large)
    assert "--max-lora-rank 64 " in render(describe(tmp_path / "large"))
    for part in ("# sql", "Writes SQL.", "list all singers", "| exact | 0.95 |", "0.8"):
        assert part in text
    weights = (tmp_path / "sql" / "adapter_model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() in text
    assert "0123456789abcdef" in text


def test_a_merge_shows_its_recipe_and_its_sources(tmp_path):
    place = folder(tmp_path / "mix")
    recipe = {"mix": "a:0.5+b:0.5", "method": "sum", "adapters": {"a": "d1", "b": "d2"}}
    (place / "merge.json").write_text(json.dumps(recipe | {"kept": {"x": 1}}))
    text = render(describe(place, licence="mit"))
    assert matter(text)["tags"] == ["loramix", "lora", "merge"]
    assert '"mix": "a:0.5+b:0.5"' in text
    assert "kept" not in text
    assert "| source adapter b | `d2` |" in text
    (place / "merge.json").write_text('{"adapters": []}')
    with pytest.raises(FormatError, match="adapters are no object"):
        describe(place)


def test_a_base_that_is_not_on_the_hub_is_not_linked(tmp_path):
    text = render(published(tmp_path / "x", dataclasses.replace(CARD, base="pocket")))
    assert "base_model" not in matter(text)
    assert "`pocket`" in text


@pytest.mark.parametrize(
    ("files", "relation"),
    [
        (["config.json"], "finetune"),
        (["config.json", "merge.json"], "merge"),
        (["config.json", "merge.json", "rounded"], "quantized"),
        (["m.gguf"], "quantized"),
    ],
    ids=str,
)
def test_the_relation_to_the_base(files, relation, tmp_path):
    for name in files:
        (tmp_path / name).write_text('{"mix": "a+b"}')
    if "rounded" in files:
        (tmp_path / "config.json").write_text('{"quantization_config": {}}')
    found = describe(tmp_path, base="tiny/llama")
    assert matter(render(found))["base_model_relation"] == relation


def test_the_commands_it_shows_exist(tmp_path, capsys):
    text = render(published(tmp_path / "sql"))
    for line in "".join(re.findall(r"```sh\n(.*?)```", text, re.S)).splitlines():
        words = shlex.split(line)
        if words[0] == "loramix":
            verbs = words[1:3] if words[1] == "adapters" else words[1:2]
            assert main([*verbs, "--help"]) == 0
            named = {word for word in words if word.startswith("--")}
            assert named <= set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
        else:
            assert words[0] in ("vllm", "llama-server")


def test_the_command_writes_it_once(tmp_path, capsys):
    place = folder(tmp_path / "sql")
    assert main(["card", str(place), "--licence", "mit", "--dataset", "me/rows"]) == 0
    text = (place / "README.md").read_text("utf-8")
    assert matter(text)["license"] == "mit"
    assert main(["card", str(place)]) == 1
    assert "--replace writes it anew" in capsys.readouterr().err
    assert (place / "README.md").read_text("utf-8") == text
    assert main(["card", str(place), "--replace"]) == 0
    assert "No licence is known" in capsys.readouterr().err


NAMES = [name for tier in TIERS for name in tier]


@given(st.lists(st.sampled_from(NAMES), min_size=1, max_size=4))
def test_no_licence_is_loosened(names):
    found = strictest(names)
    assert found == "other" or found in names
    rank = {name: tier for tier, each in enumerate(TIERS) for name in each}
    assert found == "other" or rank[found] == max(rank[name] for name in names)
    assert strictest(reversed(names)) == found
    assert strictest([*names, ""]) == ""
    assert strictest([*names, "our-own"]) == "other"
