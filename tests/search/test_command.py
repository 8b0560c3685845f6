"""`loramix search` on a tiny base and its library."""

from __future__ import annotations

import json

import pytest

from loramix.cli import main
from loramix.library import Library
from loramix.search.methods import METHODS
from tests.shop import QUERIES


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "dev.jsonl"
    rows = [{"query": query, "answer": "the reason"} for query in QUERIES["sql"][:20]]
    turns = [{"role": "user", "content": "and here"}, {"role": "assistant", "content": "no"}]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in [*rows, {"messages": turns}]))
    return str(path)


def run(shop, data, *words):
    where = ("--base", shop.base, "--library", shop.library)
    return main(["search", *where, "--data", data, "--budget", "12", *words])


@pytest.mark.parametrize("method", METHODS)
def test_a_mix_is_found_for_the_loss(shop, data, method, capsys):
    assert run(shop, data, "--method", method, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ended"] in ("budget", "converged")
    assert found["gain"]["mean"] == pytest.approx(found["start_loss"] - found["loss"])
    assert found["trials"] <= 13
    assert sum(found["num_rows"].values()) == 21
    assert found["is_proven"] == (found["gain"]["low"] > 0)
    assert main(["ask", "list it", "--base", shop.base, "--library", shop.library, "-m",
                 found["mix"], "--max-tokens", "2"]) == 0  # fmt: skip


def test_answers_can_be_searched_by_a_metric(shop, data, capsys):
    assert run(shop, data, "--objective", "f1", "--method", "hill", "--max-tokens", "4") == 0
    out = capsys.readouterr().out
    assert "1 - f1" in out
    assert "by hill" in out


def test_weights_per_layer_become_an_adapter(shop, data, tmp_path, capsys):
    shelf = Library(tmp_path / "library")
    for name in Library(shop.library).names():
        shelf.put(Library(shop.library).load(name))
    where = ("--base", shop.base, "--library", str(shelf.folder))
    words = ("search", *where, "--data", data, "--budget", "12", "--per-layer", "--name", "both")
    assert main(words) == 0
    assert "both" in capsys.readouterr().out
    assert shelf.card("both").scores["heldout_loss"] > 0
    assert main(["ask", "list it", *where, "-m", "both", "--max-tokens", "2"]) == 0
    assert main(words) == 1
    assert "has an adapter 'both'" in capsys.readouterr().err


def test_an_interrupt_prints_the_best_so_far(shop, data, monkeypatch, capsys):
    def stopped(trials, rng):
        raise KeyboardInterrupt

    monkeypatch.setitem(METHODS, "gradient", stopped)
    assert run(shop, data, "--json") == 130
    assert json.loads(capsys.readouterr().out)["ended"] == "interrupted"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--adapters", "banking,sqll"), "Did you mean 'sql'"),
        (("--method", "magic"), "Unknown method"),
        (("--objective", "magic"), "Unknown metric"),
        (("--objective", "no.such:thing"), "No metric"),
        (("--objective", "exact"), "no gradient"),
        (("--budget", "1"), "starts"),
        (("--per-layer",), "--name"),
        (("--name", "x"), "--per-layer"),
        (("--name", "Base", "--per-layer"), "cannot name"),
        (("--objective", "f1", "--per-layer", "--name", "x"), "--objective loss"),
    ],
)
def test_bad_words_are_one_line(shop, data, words, says, capsys):
    assert run(shop, data, *words) == 1
    out, err = capsys.readouterr()
    assert not out
    assert says in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "row",
    [
        "[]",
        "{",
        '{"query": "a"}',
        '{"query": "a", "answer": ""}',
        '{"query": 3, "answer": "x"}',
        '{"messages": [{"role": "user", "content": "x"}]}',
        '{"messages": [{"role": "user"}]}',
        '{"messages": ["x"]}',
        '{"messages": []}',
        '{"messages": 3}',
    ],
)
def test_a_bad_row_is_named(shop, tmp_path, row, capsys):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"query": "a", "answer": "b"}\n' + row + "\n")
    assert run(shop, str(path)) == 1
    assert "Item 2 of" in capsys.readouterr().err
