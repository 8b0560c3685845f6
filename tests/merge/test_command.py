"""`loramix merge` as it is typed."""

from __future__ import annotations

import pytest

from loramix.cli import main
from loramix.library import Library


@pytest.fixture
def merge(shop, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def run(*words):
        status = main(["merge", "--library", shop.library, *words])
        return status, *capsys.readouterr()

    return run


def test_a_mix_becomes_an_adapter_that_a_library_takes(merge, tmp_path):
    status, told, _ = merge("-m", "sql:0.5+banking:0.5", "-o", "both", "--rank", "4")
    assert status == 0
    assert "banking:0.5+sql:0.5 by sum into both" in told
    assert "of rank 3 to 4" in told or "of rank 4" in told
    assert Library(tmp_path / "mine").add(tmp_path / "both").name == "both"


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["-m", "auto", "-o", "x"], "name adapters"),
        (["-m", "base", "-o", "x"], "nothing to merge"),
        (["-m", "nobody", "-o", "x"], "No adapter 'nobody'"),
        (["-m", "sql", "-o", "x", "--method", "mean"], "expected one of average"),
        (["-m", "sql", "-o", "x", "--set", "density=1"], "no setting"),
        (["-m", "sql", "-o", "x", "--rank", "0"], "at least 1"),
        (["-m", "sql", "-o", "x", "--rank", "1", "--energy", "0.5"], "not both"),
        (["-m", "sql", "-o", "."], "exists"),
        (["-m", "sql", "-o", ".", "--replace"], "where you are"),
        (["-m", "sql", "-o", "..", "--replace"], "where you are"),
        (["-m", "sql", "-o", "x", "--shard-size", "1GB"], "--shard-size does not go with this"),
        (["-m", "sql", "-o", "x", "--into", "pocket", "--rank", "4"], "takes the whole update"),
        (["-m", "sql", "-o", "x", "--lint"], "--output does not go with this: --lint only looks"),
        (["-m", "sql", "-o", "x", "--verify"], "--verify does not go with this"),
        (["-m", "sql", "--lint", "--rank", "4"], "--rank does not go"),
        (["-m", "sql", "--lint", "--prove"], "--prove does not go"),
    ],
)
def test_what_cannot_be_done_is_one_sentence_and_no_file(words, hint, merge, tmp_path):
    status, told, error = merge(*words)
    assert status == 1
    assert hint in error
    assert error.count("\n") == 1
    assert not told
    assert not list(tmp_path.iterdir())
