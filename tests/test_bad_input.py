"""Whatever is wrong with the input: one sentence on stderr, exit status 1, nothing written."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loramix.cli import main
from loramix.formats import peft
from tests.shop import SQL, Shop
from tests.tiny import random_adapter, tiny_base

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 100000\n"


@pytest.fixture(scope="module")
def junk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of things that are not what they should be, and one good adapter."""
    folder = tmp_path_factory.mktemp("junk")
    model = tiny_base(seed=1).model
    peft.write(random_adapter(model, "good", seed=5), folder / "good")
    peft.write(random_adapter(tiny_base("gpt2").model, "gpt2", seed=5), folder / "other-model")
    peft.write(random_adapter(tiny_base(hidden_size=64).model, "wide"), folder / "other-size")
    _variants(folder)
    _files(folder)
    return folder


def _copy(folder: Path, name: str) -> Path:
    shutil.copytree(folder / "good", folder / name)
    return folder / name


def _variants(folder: Path) -> None:
    """The good adapter, spoilt in one way each."""
    raw = (folder / "good" / WEIGHTS).read_bytes()
    (_copy(folder, "truncated") / WEIGHTS).write_bytes(raw[: len(raw) // 2])
    (_copy(folder, "empty-weights") / WEIGHTS).write_bytes(b"")
    (_copy(folder, "pointer") / WEIGHTS).write_text(POINTER)
    (_copy(folder, "pointer-config") / CONFIG).write_text(POINTER)
    (_copy(folder, "no-weights") / WEIGHTS).unlink()
    (_copy(folder, "no-config") / CONFIG).unlink()
    (_copy(folder, "broken-config") / CONFIG).write_text('{"peft_type": "LORA", ')
    (_copy(folder, "list-config") / CONFIG).write_text("[]")
    _configure(_copy(folder, "prompt-tuning"), peft_type="PROMPT_TUNING")
    _configure(_copy(folder, "pissa"), init_lora_weights="pissa")
    _configure(_copy(folder, "full-modules"), modules_to_save=["lm_head"])
    _configure(_copy(folder, "biased"), bias="all")
    _configure(_copy(folder, "no-alpha"), lora_alpha="much")
    tensors = load_file(folder / "good" / WEIGHTS)
    first = next(iter(tensors))
    halves = {name: t for name, t in tensors.items() if "lora_B" not in name}
    _save(_copy(folder, "nan"), tensors | {first: torch.full_like(tensors[first], torch.nan)})
    _save(_copy(folder, "half"), halves)
    _save(_copy(folder, "integers"), {name: t.int() for name, t in tensors.items()})
    _save(_copy(folder, "more"), tensors | {"model.embed_tokens.weight": torch.zeros(4, 4)})
    _save(_copy(folder, "silent"), {n: torch.zeros_like(t) for n, t in tensors.items()})


def _configure(folder: Path, **changes: object) -> None:
    settings = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(settings | changes))


def _save(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / WEIGHTS)


def _files(folder: Path) -> None:
    (folder / "nothing").mkdir()
    (folder / "a-file").write_text("hello")
    (folder / "empty.txt").write_text(" \n\n")
    (folder / "latin.txt").write_bytes("prêt".encode("latin-1"))
    (folder / "bell.txt").write_text("fine\nnot \a fine\n")
    (folder / "rows.jsonl").write_text('{"adapter": "sql", "query": "x"}\nnot json\n')
    (folder / "keys.jsonl").write_text('{"adapter": "sql", "text": "x"}\n')
    (folder / "stranger.jsonl").write_text('{"adapter": "nobody", "query": "x"}\n')
    torch.save({"weight": torch.zeros(2)}, folder / "pickle.bin")
    model = folder / "broken-base"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "llama"')


ASK = ("ask", SQL)
MIXES = [
    "",
    " ",
    "+",
    "sql+",
    "sql++banking",
    "sql:",
    ":0.5",
    "sql:x",
    "sql:nan",
    "sql:inf",
    "sql:1e3",
    "sql:0.5+sql:0.5",
    "SQL",
    "sql, banking",
    "sql:0.5:0.5",
    "sql=0.5",
    "../sql",
    "sql:--1",
    "base+sql",
    "auto:0.5",
    "sqll",
    "7",
    "sql:0.5\n",
    "s" * 65,
]
TEXTS = ["", " \n ", "a\0b", "bell \a", "escape \x1b[31m", "half \udcff", "word " * 20_000]
SPOILT = [
    "truncated",
    "empty-weights",
    "pointer",
    "pointer-config",
    "no-weights",
    "no-config",
    "broken-config",
    "list-config",
    "prompt-tuning",
    "pissa",
    "full-modules",
    "biased",
    "no-alpha",
    "nan",
    "half",
    "integers",
    "more",
    "nothing",
    "a-file",
    "pickle.bin",
    "not-there",
]
SAMPLING = [
    ("--temperature", "-1"),
    ("--temperature", "nan"),
    ("--temperature", "hot"),
    ("--top-p", "0"),
    ("--top-p", "1.5"),
    ("--top-k", "0"),
    ("--top-k", "2.5"),
    ("--max-tokens", "0"),
    ("--max-tokens", "-5"),
    ("--max-tokens", "1000000"),
    ("--stop", ""),
    ("--seed", "now"),
    ("--dtype", "float8"),
    ("--device", "abacus"),
]
CASES: list[tuple[str, ...]] = [
    *[(*ASK, "-m", mix) for mix in MIXES],
    *[("ask", text) for text in TEXTS],
    *[("route", text) for text in TEXTS[:4]],
    *[(*ASK, flag, value) for flag, value in SAMPLING],
    *[("adapters", "add", "JUNK/" + name) for name in SPOILT],
    ("ask",),
    (*ASK, "--file", "JUNK/a-file"),
    ("ask", "-"),
    ("ask", "--file", "JUNK/not-there"),
    ("ask", "--file", "JUNK/nothing"),
    ("ask", "--file", "JUNK/empty.txt"),
    ("ask", "--file", "JUNK/latin.txt"),
    ("ask", "--file", "JUNK/bell.txt"),
    (*ASK, "--library", "JUNK/a-file"),
    (*ASK, "--library", "JUNK/nothing"),
    (*ASK, "--library", "JUNK/not-there"),
    (*ASK, "--base", "JUNK/not-there"),
    (*ASK, "--base", "JUNK/nothing"),
    (*ASK, "--base", "JUNK/broken-base"),
    (*ASK, "--base", "JUNK/a-file"),
    (*ASK, "--base", ""),
    (*ASK, "--base", "no such base"),
    ("route", SQL, "--library", "JUNK/nothing"),
    ("chat", "-m", "sqll"),
    ("adapters", "show", "sqll"),
    ("adapters", "check", "sqll"),
    ("adapters", "remove", "sqll"),
    ("adapters", "remove", "_router"),
    ("adapters", "remove", "../library"),
    ("adapters", "list", "--library", "JUNK/a-file"),
    ("adapters", "add", "JUNK/good", "--name", "base"),
    ("adapters", "add", "JUNK/good", "--name", "auto"),
    ("adapters", "add", "JUNK/good", "--name", "12"),
    ("adapters", "add", "JUNK/good", "--name", "../out"),
    ("adapters", "add", "JUNK/good", "--name", "_router"),
    ("adapters", "add", "JUNK/good", "--name", "Good"),
    ("adapters", "add", "JUNK/good", "--name", ""),
    ("adapters", "add", "JUNK/good", "--name", "sql"),
    ("adapters", "add", "JUNK/good", "--revision", "main"),
    ("adapters", "add", "JUNK/good", "--examples", "JUNK/not-there"),
    ("adapters", "add", "JUNK/good", "--examples", "JUNK/empty.txt"),
    ("adapters", "add", "JUNK/good", "--examples", "JUNK/rows.jsonl"),
    ("adapters", "add", "no spaces in hub ids"),
    ("adapters", "add", ""),
    ("route", "fit", "JUNK/not-there"),
    ("route", "fit", "JUNK/rows.jsonl"),
    ("route", "fit", "JUNK/keys.jsonl"),
    ("route", "fit", "JUNK/stranger.jsonl"),
]


def tree(*folders: Path) -> str:
    """A digest of the names and bytes of everything below some folders."""
    state = hashlib.sha256()
    for file in sorted(f for folder in folders for f in folder.rglob("*")):
        state.update(str(file).encode() + (file.read_bytes() if file.is_file() else b"/"))
    return state.hexdigest()


def _words(case: tuple[str, ...], junk: Path, shop: Shop) -> list[str]:
    """The command line of a case: the junk in its place, the tiny base and library by default."""
    words = [word.replace("JUNK", str(junk)) for word in case]
    takes_base = case[0] in {"ask", "route", "chat"} or case[:2] == ("adapters", "check")
    if takes_base and "--base" not in case:
        words += ["--base", shop.base]
    return words if "--library" in case else [*words, "--library", shop.library]


def _name(case: tuple[str, ...]) -> str:
    return " ".join(word[:24] for word in case).encode("ascii", "backslashreplace").decode()


@pytest.mark.parametrize("case", CASES, ids=_name)
def test_bad_input_is_one_sentence_and_changes_nothing(
    case, junk, shop, capsys, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORAMIX_LIBRARY", str(tmp_path / "own"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    places = (junk, Path(shop.library), Path(shop.base), tmp_path)
    before = tree(*places)
    status = main(_words(case, junk, shop))
    out, err = capsys.readouterr()
    assert (status, out) == (1, ""), err
    assert err.startswith("Error: ")
    assert err.count("\n") == 1
    assert len(err) < 500
    assert err.rstrip().endswith((".", "?"))
    assert tree(*places) == before


@pytest.mark.parametrize("name", ["other-model", "other-size", "silent"])
def test_an_adapter_that_does_not_fit_or_act_is_refused_by_check(
    name, junk, shop, capsys, monkeypatch, tmp_path
):
    library = ["--library", str(tmp_path)]
    added = main(["adapters", "add", str(junk / name), *library])
    assert main(["adapters", "check", name, "--base", shop.base, *library]) == 1
    err = capsys.readouterr().err
    assert err.splitlines()[-1].startswith("Error: ")
    assert added in {0, 1}  # an update of zeros may be refused sooner


def test_there_are_more_than_forty_cases():
    assert len(CASES) == len(set(CASES)) > 100
