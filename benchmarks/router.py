"""The router against semantic-router 1.1.1, both on the same MiniLM vectors.

    pip install -r benchmarks/requirements.txt
    LORAMIX_DATA=... python benchmarks/router.py [PART ...] [--quick] [--json FILE] [--cache FILE]

Parts: full, none, few, broad, pairs, typos, plain; all by default. Every text
is encoded once, and `--cache` keeps the vectors for the next run. semantic-router is the library
itself in its default setting (mean of the five nearest); where none is an answer, its confidence is
fitted on the same held-out rows, and must be 0.5. Few-shot figures are means over three draws
(`--quick`: one); there both also get each route's name as an example, as a card would give it.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from queries import (
    Memo,
    Pairs,
    banking,
    clinc,
    domains,
    few,
    grouped,
    joined,
    mistyped,
)
from semantic_router import IndexedRouter, Route
from semantic_router.encoders import DenseEncoder

from loramix.chat import Message
from loramix.mix import Mix
from loramix.route import Router
from loramix.route.encode import NgramEncoder
from loramix.route.gate import GateRouter
from loramix.route.ngrams import Floats

PEER = "semantic-router 1.1.1"


class Row(NamedTuple):
    work: str
    figure: float
    unit: str
    peer: float | None
    target: float
    better: str = "higher"

    def __str__(self) -> str:
        peer = "" if self.peer is None else f"{PEER} {self.peer:.2f}"
        reached = (
            self.figure >= self.target if self.better == "higher" else self.figure <= self.target
        )
        sign = ">=" if self.better == "higher" else "<="
        mark = "" if reached else "  NOT REACHED"
        return (
            f"{self.work:58}{self.figure:8.2f} {self.unit:4} {peer:30} "
            f"target {sign} {self.target:g}{mark}"
        )


class Lookup(DenseEncoder):
    """semantic-router's view of the same vectors."""

    name: str = "memo"
    memo: Any

    def __call__(self, docs: list[str]) -> list[list[float]]:
        return self.memo.encode(docs).tolist()


class World(NamedTuple):
    """The data sets, the encoder and how often to draw."""

    memo: Memo
    clinc: dict[str, Pairs]
    banking: dict[str, Pairs]
    domain: dict[str, str]
    draws: int

    def broad(self, split: str) -> Pairs:
        return [(text, self.domain[intent]) for text, intent in self.clinc[split]]

    def ours(self, examples: Mapping[str, Sequence[str]]) -> GateRouter:
        return GateRouter.fit(examples, encoder=self.memo)

    def theirs(self, examples: Mapping[str, Sequence[str]]) -> IndexedRouter:
        routes = [Route(name=name, utterances=list(texts)) for name, texts in examples.items()]
        return IndexedRouter(encoder=Lookup(memo=self.memo), routes=routes)


def texts(rows: Pairs) -> list[str]:
    return [text for text, _ in rows]


def hits(router: Router, rows: Pairs) -> float:
    """Percent of rows whose best route is their own, when one must be chosen."""
    names = np.array(router.adapters)
    best = np.array(router.scores(texts(rows))).argmax(1)
    return percent(names[best] == np.array([route for _, route in rows]))


def their_hits(router: IndexedRouter, rows: Pairs) -> float:
    return 100 * float(router.evaluate(*zip(*rows, strict=True)))


def percent(right: Any) -> float:
    return 100 * float(np.mean(right))


def area(inside: Floats, outside: Floats) -> float:
    from sklearn.metrics import roc_auc_score

    truth = np.r_[np.ones(len(inside)), np.zeros(len(outside))]
    return float(roc_auc_score(truth, np.r_[inside, outside]))


def decided(router: GateRouter, rows: Pairs) -> tuple[list[str], Floats]:
    """The first route of each row's mix ("" for none), and how surely it is anybody's."""
    made = [router.route([Message("user", text)]) for text in texts(rows)]
    names = [str(d.mix.top(1)).partition(":")[0] if d.mix else "" for d in made]
    return names, np.array([1 - d.none for d in made])


def choice(router: GateRouter, inside: Pairs, outside: Pairs) -> tuple[float, float, float]:
    """In-scope accuracy, recall of foreign queries, area under the curve."""
    (mine, sure), (theirs, unsure) = decided(router, inside), decided(router, outside)
    right = [name == route for name, (_, route) in zip(mine, inside, strict=True)]
    return percent(right), percent([not name for name in theirs]), 100 * area(sure, unsure)


def their_choice(
    router: IndexedRouter, held: Pairs, foreign: Pairs, inside: Pairs, outside: Pairs
) -> tuple[float, float]:
    """The same of semantic-router, its confidence fitted on held-out rows and set to 0.5."""
    labels: list[str | None] = [route for _, route in held] + [None] * len(foreign)
    router.fit(texts(held) + texts(foreign), labels)
    router.confidence_threshold = 0.5
    nobody = [(text, None) for text, _ in outside]
    return their_hits(router, inside), their_hits(router, nobody)


def error_of_confidence(router: GateRouter, rows: Pairs, bins: int = 15) -> float:
    """Expected calibration error of the best route's probability among the routes."""
    scores = np.array(router.scores(texts(rows)))
    scores /= scores.sum(1, keepdims=True)
    names, sure = np.array(router.adapters), scores.max(1)
    right = names[scores.argmax(1)] == np.array([route for _, route in rows])
    place = np.minimum((sure * bins).astype(int), bins - 1)
    parts = [place == each for each in range(bins)]
    gaps = [abs(right[p].mean() - sure[p].mean()) * p.mean() for p in parts if p.any()]
    return float(sum(gaps))


def full(world: World) -> list[Row]:
    found = []
    sets = {"CLINC150": (world.clinc, 95.5), "BANKING77": (world.banking, 94)}
    for name, (data, target) in sets.items():
        examples = grouped(data["train"])
        ours, theirs = world.ours(examples), world.theirs(examples)
        rows = data["test"]
        found.append(
            Row(
                f"{name}, one must be chosen",
                hits(ours, rows),
                "%",
                their_hits(theirs, rows),
                target,
            )
        )
        wrong = 100 * error_of_confidence(ours, rows)
        found.append(Row(f"{name}, calibration error", wrong, "%", None, 2, "lower"))
    return found


def none(world: World) -> list[Row]:
    data, found = world.clinc, []
    for name, of, keep, targets in (
        ("CLINC150", {route: route for route in world.domain}, 0.97, (94, 85, 93, 79)),
        ("10 domains", world.domain, 0.965, (95, 80, 93, 75)),
    ):
        own = {s: [(t, of[route]) for t, route in data[s]] for s in ("train", "val", "test")}
        examples, held = grouped(own["train"]), grouped(own["val"])
        ours = world.ours(examples)
        blind = choice(ours.calibrated(held, keep=0.965), own["test"], data["oos_test"])
        told = ours.calibrated(held, texts(data["oos_val"]), keep=keep)
        seen = choice(told, own["test"], data["oos_test"])
        theirs = their_choice(
            world.theirs(examples), own["val"], data["oos_val"], own["test"], data["oos_test"]
        )
        found += [
            Row(f"{name} or none, 100 foreign rows: in scope", seen[0], "%", theirs[0], targets[0]),
            Row(f"{name} or none, 100 foreign rows: recall", seen[1], "%", theirs[1], targets[1]),
            Row(f"{name} or none, no foreign row: in scope", blind[0], "%", theirs[0], targets[2]),
            Row(f"{name} or none, no foreign row: recall", blind[1], "%", theirs[1], targets[3]),
        ]
        if name == "CLINC150":
            found.append(Row(f"{name} or none, AUROC", seen[2], "%", None, 98))
    return found


def few_shot(world: World) -> list[Row]:
    found = []
    for name, data, count, target in (
        ("CLINC150", world.clinc, 10, 91),
        ("CLINC150", world.clinc, 5, 87.5),
        ("BANKING77", world.banking, 10, 86.5),
        ("BANKING77", world.banking, 5, 80.5),
    ):
        draws = [few(data["train"], count, seed, named=True) for seed in range(world.draws)]
        ours = np.mean([hits(world.ours(each), data["test"]) for each in draws])
        theirs = np.mean([their_hits(world.theirs(each), data["test"]) for each in draws])
        found.append(Row(f"{name}, {count} examples a route", ours, "%", theirs, target))
    return found


def broad(world: World) -> list[Row]:
    train, test = world.broad("train"), world.broad("test")
    every = grouped(train)
    found = [
        Row(
            "10 domains, all examples",
            hits(world.ours(every), test),
            "%",
            their_hits(world.theirs(every), test),
            97.5,
        )
    ]
    draws = [few(train, 20, seed, named=False) for seed in range(world.draws)]
    ours = np.mean([hits(world.ours(each), test) for each in draws])
    theirs = np.mean([their_hits(world.theirs(each), test) for each in draws])
    return [*found, Row("10 domains, 20 examples each", ours, "%", theirs, 83)]


def pairs(world: World) -> list[Row]:
    """Two queries of different domains in one; no joiner is known to the router."""
    router = world.ours(grouped(world.broad("train")))
    theirs = world.theirs(grouped(world.broad("train")))
    rows = joined(world.clinc["test"], world.domain, 600, seed=4)
    asked = [two_of(router, text) == routes for text, routes in rows]
    peer = [{c.name for c in theirs(text, limit=2)} == routes for text, routes in rows]
    free = [{*routed(router, text)} == routes for text, routes in rows]
    single = texts(world.clinc["test"])[::3]
    false = [len(routed(router, text)) > 1 for text in single]
    unread = replace(router, encoder=world.memo.encoder)  # remembers no vector
    span = milliseconds(unread, [(text, None) for text, _ in rows])[0]
    return [
        Row("two skills in one query, two asked for", percent(asked), "%", percent(peer), 85),
        Row("two skills in one query, the router decides", percent(free), "%", None, 65),
        Row("false second adapter on single queries", percent(false), "%", None, 5, "lower"),
        Row("one query of two skills, p50", span, "ms", None, 25, "lower"),
    ]


def routed(router: Router, text: str) -> Mix:
    return router.route([Message("user", text)]).mix


def two_of(router: GateRouter, text: str) -> set[str]:
    """The adapters of the two halves; of a text too short to cut, its two best."""
    batch, tokens = router.read(text)
    whole = router.gate.log_probs(batch)[0]
    halves = router.halves(text, whole, tokens)
    best = halves.adapters if halves else np.argsort(-whole[:-1])[:2]
    return {router.adapters[i] for i in best}


def typos(world: World) -> list[Row]:
    rng = random.Random(8)
    rows = [(mistyped(text, rng), route) for text, route in world.clinc["test"]]
    examples = grouped(world.clinc["train"])
    ours, theirs = world.ours(examples), world.theirs(examples)
    return [
        Row(
            "CLINC150, 8 % of characters wrong", hits(ours, rows), "%", their_hits(theirs, rows), 80
        )
    ]


def plain(world: World) -> list[Row]:
    """Without a sentence encoder."""
    router = GateRouter.fit(grouped(world.clinc["train"]), encoder=NgramEncoder())
    rows = world.clinc["test"]
    return [
        Row("CLINC150 on n-grams alone", hits(router, rows), "%", None, 92.5),
        Row(
            "one query on n-grams alone, p50", milliseconds(router, rows)[0], "ms", None, 2, "lower"
        ),
    ]


def milliseconds(router: Router, rows: Sequence[tuple[str, object]]) -> tuple[float, float]:
    """p50 and p95 of one query after another, end to end."""
    spans = []
    for text, _ in rows[:: max(1, len(rows) // 300)]:
        start = time.perf_counter()
        router.route([Message("user", text)])
        spans.append(1e3 * (time.perf_counter() - start))
    return float(np.median(spans)), float(np.quantile(spans, 0.95))


PARTS: dict[str, Callable[[World], list[Row]]] = {
    "full": full,
    "none": none,
    "few": few_shot,
    "broad": broad,
    "pairs": pairs,
    "typos": typos,
    "plain": plain,
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], metavar="PART")
    parser.add_argument("--quick", action="store_true", help="one draw instead of three")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--cache", type=Path, help="keep the vectors in this .npz file")
    options = parser.parse_args()
    world = World(Memo(options.cache), clinc(), banking(), domains(), 1 if options.quick else 3)
    found: list[Row] = []
    for name in options.parts or PARTS:
        for row in PARTS[name](world):
            print(row, flush=True)
            found.append(row)
        world.memo.save()
    if options.json:
        rows = [row._asdict() | {"peer": PEER, "peer_figure": row.peer} for row in found]
        options.json.write_text(json.dumps({"rows": rows}, indent=2) + "\n", "utf-8")
