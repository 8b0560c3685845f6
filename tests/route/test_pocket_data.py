"""The promise on real tasks: five experts' rows, and CLINC150's queries of none of them.

Minutes long on a busy machine, so marked slow. CLINC150 is for testing only: no row of it is ever
trained on, and this file is the one place that reads its out-of-scope test rows.
"""

from __future__ import annotations

import gzip
import json
import random
import re
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest

from loramix.chat import Message
from loramix.route.encode import NgramEncoder
from loramix.route.gate import GateRouter

KEEP = 0.98

Split: TypeAlias = dict[str, tuple[list[str], list[str]]]


def lines(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def tasks(data: Path) -> Split:
    """Training and held-out queries of each expert."""
    support, bank = data / "support", data / "banking77"
    reviews = lines(data / "sentiment" / "rotten_tomatoes_mr.jsonl.gz")
    random.Random(0).shuffle(reviews)
    films = [row["text"] for row in reviews]
    advising = [r for r in lines(data / "text2sql" / "text2sql.jsonl.gz") if r["db"] == "advising"]
    problems = word_problems(data / "math")
    return {
        "support": (
            [row["utterance"] for row in lines(support / "bitext_train.jsonl.gz")],
            [row["utterance"] for row in lines(support / "bitext_dev.jsonl.gz")],
        ),
        "banking": (
            [row["text"] for row in lines(bank / "train.jsonl.gz")],
            [row["text"] for row in lines(bank / "test.jsonl.gz")],
        ),
        "sentiment": (films[:-1066], films[-1066:]),
        "sql": (
            [row["question"] for row in advising if row["split"] == "train"],
            [row["question"] for row in advising if row["split"] in {"dev", "test"}],
        ),
        "math": (problems[400:], problems[:400]),
    }


def word_problems(folder: Path) -> list[str]:
    found = [filled(row) for row in lines(folder / "mawps_asdiv_train.jsonl.gz")]
    svamp = json.loads(gzip.decompress((folder / "svamp.json.gz").read_bytes()))
    found += [f"{row['Body'].rstrip(' .')}. {row['Question']}" for row in svamp]
    random.Random(0).shuffle(found)
    return found


def filled(row: dict[str, Any]) -> str:
    numbers = [number.removesuffix(".0") for number in row["Numbers"].split()]
    return re.sub(r"number(\d+)", lambda place: numbers[int(place[1])], row["Question"])


@pytest.mark.slow
def test_five_experts_and_queries_of_none_of_them(data_dir: Path) -> None:
    split = tasks(data_dir)
    examples = {name: train for name, (train, _) in split.items()}
    router = GateRouter.fit(examples, encoder=NgramEncoder(), keep=KEEP)

    decisions = {
        name: [router.route([Message("user", text)]) for text in held]
        for name, (_, held) in split.items()
    }
    own = {
        name: float(np.mean([str(decision.mix) == name for decision in made]))
        for name, made in decisions.items()
    }
    clinc = lines(data_dir / "clinc150" / "data_full.jsonl.gz")
    foreign = [row["text"] for row in clinc if row["split"] == "oos_test"]
    to_base = [not router.route([Message("user", text)]).mix for text in foreign]
    latency = np.median([d.latency_ms for made in decisions.values() for d in made])
    found = f"own {own}, foreign to base {np.mean(to_base):.3f}, p50 {latency:.2f} ms"

    assert np.mean(list(own.values())) >= 0.97, found
    assert min(own.values()) >= 0.93, found
    assert np.mean(to_base) >= 0.75, found
    assert latency <= 10, found
