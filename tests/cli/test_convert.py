"""`loramix convert`: every source into every target, and what is said when that cannot be."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file

from loramix.cli import main
from loramix.formats import peft
from loramix.formats.checkpoint import open_config
from loramix.formats.gguf.adapter import read_adapter
from loramix.formats.peft import digest
from loramix.library import Library
from loramix.mix import Mix


def convert(*words):
    return main(["convert", *map(str, words)])


def test_an_adapter_there_and_back(shop, tmp_path, capsys):
    folder = Library(shop.library).path("sql")
    assert convert(folder, tmp_path / "sql.gguf", "--base", shop.base) == 0
    assert convert(tmp_path / "sql.gguf", tmp_path / "sql", "--base", shop.base) == 0
    assert capsys.readouterr().out.count("Wrote") == 2
    assert load_file(tmp_path / "sql" / "adapter_model.safetensors").keys()
    assert peft.read(tmp_path / "sql").digest == peft.read(folder).digest


def test_a_mix_of_the_library_becomes_one_adapter(shop, tmp_path):
    mix, flags = "banking:0.4+sql:-0.3", ["--base", shop.base, "--library", shop.library]
    assert convert(mix, tmp_path / "mix.gguf", *flags) == 0
    assert convert(mix, tmp_path / "mix", *flags) == 0
    one = peft.read(tmp_path / "mix")
    gguf = read_adapter(tmp_path / "mix.gguf", open_config(shop.base))
    assert digest(gguf.pairs) == one.digest
    assert one.rank == sum(Library(shop.library).load(name).rank for name in Mix.parse(mix))


def test_a_model_becomes_a_file(shop, tmp_path, capsys):
    assert convert(shop.base, tmp_path / "m.gguf", "--type", "q8_0") == 0
    assert (tmp_path / "m.gguf").read_bytes().startswith(b"GGUF")
    assert convert(shop.base, tmp_path / "m") == 1
    assert "is a whole model: give NAME.gguf" in capsys.readouterr().err


def test_what_cannot_be_is_said_and_nothing_is_written(shop, tmp_path, capsys):
    folder = Library(shop.library).path("sql")
    out, rows = tmp_path / "a.gguf", tmp_path / "rows.jsonl"
    rows.write_text('{"query": "the", "answer": "thing"}')
    cases = [
        ((folder, out), "names no base; give --base"),
        ((folder, out, "--base", tmp_path / "none"), "Cannot read the config"),
        ((folder, tmp_path / "a", "--type", "f16"), "--type is for .gguf files"),
        ((folder, folder), "exists; remove it first"),
        (("nobody", out, "--library", shop.library), "No adapter 'nobody'"),
        (("base", out, "--library", shop.library), "nothing to merge"),
        ((tmp_path / "x.gguf", tmp_path / "a"), "give --base for"),
        ((shop.base, out, "--rank", "4"), "--rank, --exact and --lora-only are for adapters"),
        ((shop.base, out, "--data", "rows"), "are for --type gptq or awq"),
        ((shop.base, tmp_path / "a", "--type", "gptq"), "give some by --data"),
        ((folder, tmp_path / "a", "--type", "awq", "--data", rows), "makes a folder of a model's"),
        ((shop.base, out, "--type", "gptq", "--data", rows), "makes a folder of a model's"),
        ((shop.base, tmp_path / "a", "--type", "gptq", "--data", "rows"), "rows"),
        ((shop.base, out, "--type", "q5"), "Unknown GGUF type 'q5'"),
    ]
    for words, message in cases:
        assert convert(*words) == 1, words
        error = capsys.readouterr().err
        assert message in error, words
        assert error.count("\n") == 1, words
    assert list(tmp_path.iterdir()) == [rows]


@pytest.mark.parametrize("broken", ["config.json", "tokenizer.json"])
def test_a_damaged_model_is_one_line(shop, tmp_path, capsys, broken):
    import shutil

    shutil.copytree(shop.base, tmp_path / "model")
    (tmp_path / "model" / broken).write_text(json.dumps({"model_type": "nothing"}))
    assert convert(tmp_path / "model", tmp_path / "m.gguf") == 1
    error = capsys.readouterr().err
    assert error.startswith("Error: Cannot ")
    assert error.count("\n") == 1
