"""Merging, searching, converting, publishing what is not right: one sentence, nothing written."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loramix.cli import main
from loramix.library import Library
from tests.test_bad_input import tree
from tests.tiny import random_adapter, tiny_base

ONE = "model.safetensors"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base, adapters of it and of others in `library`, and the base spoilt in many ways."""
    place = tmp_path_factory.mktemp("place")
    base = tiny_base("llama")
    base.model.save_pretrained(place / "base")
    base.tokenizer.save_pretrained(place / "base")
    library = Library(place / "library")
    for seed, name in enumerate(("one", "two"), 1):
        library.put(random_adapter(base.model, name, seed=seed))
    library.put(random_adapter(tiny_base("gpt2").model, "other"))
    library.put(random_adapter(tiny_base(hidden_size=64).model, "wide"))
    _spoil(place)
    _rows(place)
    return place


def _spoil(place):
    def copy(source, name):
        return Path(shutil.copytree(place / source, place / name))

    tensors = load_file(place / "base" / ONE)
    broken = {name: t * torch.nan for name, t in tensors.items()}
    save_file(broken, copy("base", "nan") / ONE, metadata={"format": "pt"})
    few = {k: t.to(torch.float8_e4m3fn) if t.dim() == 2 else t for k, t in tensors.items()}
    save_file(few, copy("base", "fp8") / ONE, metadata={"format": "pt"})
    raw = (place / "base" / ONE).read_bytes()
    (copy("base", "cut") / ONE).write_bytes(raw[: len(raw) // 2])
    (copy("base", "bare") / ONE).unlink()
    (copy("base", "mute") / "tokenizer.json").unlink()
    config = copy("base", "int4") / "config.json"
    told = {"quantization_config": {"quant_method": "gptq"}}
    config.write_text(json.dumps(json.loads(config.read_text()) | told))
    weights = copy("library/one", "library/sick") / "adapter_model.safetensors"
    save_file({k: t * torch.nan for k, t in load_file(weights).items()}, weights)
    whole = copy("library/one", "half") / "adapter_model.safetensors"
    whole.write_bytes(whole.read_bytes()[:-9])
    (place / "nothing").mkdir()
    (place / "file").write_text("hello")


def _rows(place):
    row = {"query": "the thing", "answer": "in there"}
    lines = [json.dumps(row | {"query": f"the {n}"}) + "\n" for n in range(12)]
    (place / "rows.jsonl").write_text("".join(lines))
    (place / "few.jsonl").write_text("".join(lines[:5]))
    (place / "empty.jsonl").write_text("")
    long = [json.dumps(row | {"query": "word " * 200 + str(n)}) + "\n" for n in range(12)]
    (place / "long.jsonl").write_text("".join(long))


MERGE, BOTH = "merge --library library -o out -m ", "merge --library library -o out -m one+two "
SEARCH = "search --library library --base base --adapters one,two --data "
CASES = {
    MERGE + "one+other": "different bases, or forms of one",
    MERGE + "one+wide": "different bases",
    MERGE + "sick": "holds NaN",
    MERGE + "other --into base": "find no tensor",
    MERGE + "wide --into base": "another base",
    MERGE + "sick+one --into base": "holds NaN",
    BOTH + "--into nowhere": "cannot be read",
    BOTH + "--into nothing": "cannot be read",
    BOTH + "--into file": "cannot be read",
    BOTH + "--into owner/name": "HF_HUB_OFFLINE",
    BOTH + "--into int4": "quantised (gptq)",
    BOTH + "--into fp8": "F8_E4M3, a quantised format",
    BOTH + "--into nan": "not a number",
    BOTH + "--into cut": "header says",
    BOTH + "--into bare": "save the base as safetensors",
    BOTH + "--into base --method ties --set density=7": "from 0 to 1",
    BOTH + "--into base --shard-size 0": "holds nothing",
    BOTH + "--method cat": "here it is sum",
    BOTH + "--method regmean": "give rows",
    BOTH + "--method regmean --data empty.jsonl": "is empty",
    BOTH + "--method regmean --base base --data rows.jsonl": "is of no adapter",
    BOTH + "--energy nan": "expected 0 < energy <= 1",
    BOTH + "--prove --base mute": "tokenizer",
    BOTH + "--prove --base bare": "safetensors",
    "merge --library library -m one -o file": "exists",
    "merge --library library -m one -o file --replace": "no adapter or model to replace",
    "merge --library library -m one -o library --replace": "no adapter or model to replace",
    "merge --library library -m one -o file/out": "Cannot write",
    "merge --library library -m one -o file/out --into base": "Not a directory",
    "merge --library library -m one+other --lint": "different bases, or forms of one",
    "merge --library library -m one --lint --into nan": "holds NaN",
    "merge --library nothing -o out -m one": "No adapter 'one'",
    "merge --library file -o out -m one": "is a file",
    SEARCH + "nowhere": "No such file",
    SEARCH + "nothing": "Is a directory",
    SEARCH + "empty.jsonl": "is empty",
    SEARCH + "few.jsonl": "too few",
    SEARCH + "long.jsonl": "this base holds 128",
    SEARCH + "rows.jsonl --budget 0": "A budget of 0 trials",
    SEARCH + "rows.jsonl --budget nan": "A budget of nan trials",
    SEARCH + "rows.jsonl --budget inf --method grid": "A budget of inf trials",
    SEARCH + "rows.jsonl --adapters=": "No adapter ''",
    SEARCH + "rows.jsonl --adapters one,sick": "holds NaN",
    SEARCH + "rows.jsonl --adapters one,other": "another model",
    SEARCH + "rows.jsonl --base nan": "finite loss",
    SEARCH + "rows.jsonl --base mute": "tokenizer",
    "convert library/sick out.gguf --base base": "holds NaN",
    "convert library/other out.gguf --base base": "has no tensor of its own",
    "convert library/wide out.gguf --base base": "another model",
    "convert library/one file/out.gguf --base base": "Cannot write",
    "convert library/one out --rank 0": "at least 1",
    "convert file out": "is of no kind read here",
    "convert nothing out.gguf": "holds nothing",
    "convert int4 out.gguf": "quantised",
    "convert fp8 out.gguf": "is float8_e4m3fn: it is quantised",
    "convert nan out.gguf": "cannot hold",
    "convert cut out.gguf": "cannot be read",
    "convert bare out.gguf": "safetensors",
    "convert mute out.gguf": "copy tokenizer.json",
    "convert base out.gguf --type q4_k": "Unknown GGUF type",
    "convert base out --rank 2 --base base": "same linear layers",
    "convert fp8 out --rank 2 --base base": "quantised",
    "card nowhere": "no folder",
    "card nothing": "the folder of an adapter or a model",
    "card library/one --scores file": "JSON",
    "push nothing owner/name": "the folder of an adapter or a model",
    "push library/one name": "no hub id",
    "push half owner/name --dry-run": "not a whole safetensors file",
    "push cut owner/name --dry-run": "not a whole safetensors file",
    "push library/one owner/name": "HF_HUB_OFFLINE",
    "pull name": "no hub id",
    "pull owner/name": "HF_HUB_OFFLINE",
    "pull owner/name -o file": "exists",
}


@pytest.mark.parametrize("line", CASES)
def test_what_is_not_right_is_one_sentence_and_nothing_is_written(line, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    before = tree(place)
    assert main(line.split(" ")) == 1
    out, err = capsys.readouterr()
    said = err.splitlines()[-1]
    assert not out
    assert said.startswith("Error: ")
    assert CASES[line] in said
    assert said.endswith((".", "?"))
    assert len(said) < 400
    assert tree(place) == before


@contextmanager
def full_disk():
    """Files end at 4,000 bytes, as on a disk that has no more.

    For as long as the command runs: the log that pytest writes its dots to may be a file too.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    "line",
    [
        BOTH.strip(),
        "convert library/one out --base base",
        "convert library/one out.gguf --base base",
        "convert library/one out.pt",
        "convert base out.gguf",
    ],
)
def test_on_a_full_disk_nothing_is_left(line, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    before = tree(place)
    with full_disk():
        status = main(line.split(" "))
    assert status == 1
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("Error: Cannot write ")
    assert err.count("\n") == 1
    assert tree(place) == before


def test_a_merge_into_a_base_goes_on_when_the_disk_has_room(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    before = tree(place)
    words = [*BOTH.split(), "--into", "base"]
    try:
        with monkeypatch.context() as patch:
            patch.setattr("loramix.merge.output.write_all", full_after(9))
            assert main(words) == 1
        assert "No space left on device; the same merge goes on" in capsys.readouterr().err
        assert not (place / "out").exists()
        assert main(words) == 0
        assert "by an earlier run" in capsys.readouterr().out
    finally:
        shutil.rmtree(place / "out", ignore_errors=True)
    assert tree(place) == before


def full_after(count):
    """What writes, until it has done so `count` times."""
    from loramix.merge.output import write_all

    left = iter(range(count))

    def write(*given):
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_all(*given)

    return write
