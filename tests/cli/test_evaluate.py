"""`loramix eval` as it is typed, and its scores in a card."""

from __future__ import annotations

import json

import pytest

from loramix.cli import main

ROWS = [{"query": "my card was stolen", "answer": "a"}, {"query": "list the cars", "answer": "b"}]


@pytest.fixture
def evaluate(shop, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))

    def run(*words):
        status = main(["eval", *shop.flags, "--data", "rows.jsonl", *words])
        return status, *capsys.readouterr()

    return run


def test_every_adapter_the_base_and_the_router_answer_every_row(evaluate, tmp_path):
    words = ("--json", "--max-tokens", "3", "--metric", "contains", "--answers", "said.jsonl")
    status, told, error = evaluate(*words)
    assert status == 0, error
    found = json.loads(told)
    assert [row["name"] for row in found["results"]] == ["base", "banking", "sql", "auto"]
    assert (found["num_rows"], found["metric"], found["max_tokens"]) == (2, "contains", 3)
    said = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    assert [row["messages"][0]["content"] for row in said] == [row["query"] for row in ROWS]
    for result in found["results"]:
        hits = [row["hits"][result["name"]] for row in said]
        assert result["score"]["mean"] == sum(hits) / 2
        assert 0 <= result["score"]["low"] <= result["score"]["high"] <= 1


def test_scores_go_into_a_card(evaluate, shop, tmp_path, capsys):
    _, told, _ = evaluate("-m", "base", "-m", "sql:0.5+banking:0.5", "--json", "--max-tokens", "2")
    (tmp_path / "scores.json").write_text(told)
    assert main(["merge", *shop.flags[2:], "-m", "sql:0.5+banking:0.5", "-o", "both"]) == 0
    assert main(["card", "both", "--scores", "scores.json"]) == 0
    text = (tmp_path / "both" / "README.md").read_text()
    assert "2 rows of rows.jsonl, with 95 % intervals:" in text
    assert "| banking:0.5+sql:0.5 | 0.000 (0.000 to 0.000) |" in text
    (tmp_path / "scores.json").write_text('{"results": [{"name": "x"}]}')
    assert main(["card", "both", "--scores", "scores.json", "--replace"]) == 1
    assert "run it again" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["-m", "nobody"], "No adapter 'nobody'"),
        (["--metric", "bleu"], "Unknown metric 'bleu'"),
        (["--answers", "rows.jsonl"], "exists"),
    ],
)
def test_mistakes_are_told_before_a_model_is_opened(words, hint, evaluate):
    status, told, error = evaluate(*words, "--base", "/nowhere")
    assert (status, told) == (1, "")
    assert hint in error
    assert error.count("\n") == 1
