"""The models in the package: their size, their fit, and what a user sees of them first."""

from __future__ import annotations

import json

import pytest

import loramix
from loramix.base import open_base
from loramix.engine import Sampling
from loramix.folders import POCKET
from loramix.library import Library, check
from loramix.lm import ROUTER

EXPERTS = ["banking", "math", "sentiment", "sql", "support"]
GREEDY = Sampling(temperature=0, max_tokens=320)


@pytest.fixture(scope="module")
def lm():
    with loramix.open("pocket") as lm:
        yield lm


def demo_rows():
    lines = (POCKET / "queries.jsonl").read_text("utf-8").rstrip("\n").split("\n")
    return [json.loads(line) for line in lines]


def test_everything_fits_in_48_megabytes():
    files = [path for path in POCKET.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 48e6
    assert not [path for path in files if path.suffix in {".bin", ".pt", ".pkl"}]


def test_the_base_is_small_and_every_expert_was_trained_on_it():
    base = open_base("pocket")
    library = Library(POCKET / "library")
    assert base.model.num_parameters() <= 11e6
    assert library.names() == EXPERTS
    for name in EXPERTS:
        adapter = library.load(name)
        assert adapter.rank <= 32
        assert adapter.card.base_fingerprint == base.fingerprint
        assert adapter.card.scores
        assert check(adapter, base).mean_kl > 0.01


def test_a_dozen_real_queries_get_their_experts_answers(lm):
    rows = demo_rows()
    assert len(rows) == 12
    replies = lm.ask_all([row["query"] for row in rows], sampling=GREEDY)
    routed = [r for r, row in zip(replies, rows, strict=True) if row["task"] in r.mix]
    right = [r for r, row in zip(replies, rows, strict=True) if r.text == row["reference"]]
    assert len(routed) >= 10
    assert len(right) >= 6
    assert not {row["task"] for row in rows} - {*EXPERTS, "none"}


def test_auto_is_repeatable_and_its_mix_replays_the_answer(lm):
    query = demo_rows()[0]["query"]
    first, second = (lm.ask(query, mix="auto", sampling=GREEDY) for _ in range(2))
    assert (first.mix, first.text) == (second.mix, second.text)
    assert lm.ask(query, mix=str(first.mix), sampling=GREEDY).text == first.text


def test_a_stranger_to_all_tasks_goes_to_the_base(lm):
    assert str(lm.route("what is the tallest mountain on mars").mix) == "base"


def test_the_router_lies_beside_the_experts():
    assert (POCKET / "library" / ROUTER).is_dir()
