"""The router against semantic-router 1.1.1, both on the same MiniLM vectors.

    pip install -r benchmarks/requirements.txt
    LORAMIX_DATA=... python benchmarks/router.py [PART ...] [--quick] [--json FILE] [--cache FILE]

Parts: full, none, few, broad, pairs, typos, corrections, joining, plain, speed; all by default.
Every text is encoded once, and `--cache` keeps the vectors for the next run. What is compared, and
how, is in judged.py. Few-shot figures are means over three draws (`--quick`: one); there both also
get each route's name as an example, as a card would give it. Twenty examples of each broad route
are drawn ten times, because single draws lie four points apart.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from judged import (
    PEER,
    calibrate,
    choice,
    error_of_confidence,
    firsts,
    hits,
    percent,
    routed,
    their_choice,
    their_error,
    their_firsts,
    their_hits,
    their_routes,
)
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
    texts,
)
from waits import joining, speed, timed, unread, unread_peer
from world import Row, World

from loramix.route.calibration import calibrated
from loramix.route.encode import NgramEncoder
from loramix.route.gate import GateRouter
from loramix.route.nearest import NearestRouter

R = TypeVar("R")

KEEP = 0.965  # of own queries, where none is an answer
DRAWS = 10  # of 20 examples of a broad route
CORRECTIONS, EVERY = 400, 500  # errors that are corrected; queries between two refits


def full(world: World) -> list[Row]:
    found = []
    sets = {"CLINC150": (world.clinc, 95.5), "BANKING77": (world.banking, 94)}
    for name, (data, target) in sets.items():
        examples, rows = grouped(data["train"]), data["test"]
        ours = world.ours(examples)
        wrong = error_of_confidence(ours, rows), their_error(examples, world.memo, rows)
        found += [
            Row(
                f"{name}, one must be chosen",
                hits(ours, rows),
                "%",
                world.their_hits(examples, rows),
                target,
            ),
            Row(f"{name}, calibration error", wrong[0], "%", wrong[1], 2, "lower"),
        ]
    return found


def none(world: World) -> list[Row]:
    """semantic-router's confidence is fitted with the foreign rows, which helps it, in all rows.

    One `keep` for all: the least, in steps of a quarter percent, with which 94 % of CLINC150's
    validation rows and 95 % of those of the domains are right. Every query has one route, so ours
    does not look for two.
    """
    data, found = world.clinc, []
    for name, of, targets in (
        ("CLINC150", {route: route for route in world.domain}, (94, 85, 93, 79)),
        ("10 domains", world.domain, (95, 80, 93, 75)),
    ):
        own = {s: [(t, of[route]) for t, route in data[s]] for s in ("train", "val", "test")}
        examples, held = grouped(own["train"]), grouped(own["val"])
        ours = replace(world.ours(examples), top=1)
        blind = choice(calibrated(ours, held, keep=KEEP), own["test"], data["oos_test"])
        told = calibrated(ours, held, texts(data["oos_val"]), keep=KEEP)
        seen = choice(told, own["test"], data["oos_test"])
        theirs = their_choice(
            world.theirs(examples), own["val"], data["oos_val"], own["test"], data["oos_test"]
        )
        with_rows, without = f"{name} or none, 100 foreign rows", f"{name} or none, no foreign row"
        found += [
            Row(f"{with_rows}: in scope", seen[0], "%", theirs[0], targets[0]),
            Row(f"{with_rows}: recall", seen[1], "%", theirs[1], targets[1]),
            Row(f"{without}: in scope", blind[0], "%", theirs[0], targets[2]),
            Row(f"{without}: recall", blind[1], "%", theirs[1], targets[3]),
        ]
        if name == "CLINC150":
            found.append(Row(f"{name} or none, AUROC", seen[2], "%", theirs[2], 98))
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
        ours, theirs = _means(world, draws, data["test"])
        found.append(Row(f"{name}, {count} examples a route", ours, "%", theirs, target))
    return found


def broad(world: World) -> list[Row]:
    train, test = world.broad("train"), world.broad("test")
    router, peers = world.ours(grouped(train)), world.their_hits(grouped(train), test)
    draws = [few(train, 20, seed, named=False) for seed in range(DRAWS)]
    ours_few, theirs_few = _means(world, draws, test)
    nearest = hits(NearestRouter.of(router), test)
    return [
        Row("10 domains, all examples", hits(router, test), "%", peers, 97.5),
        Row("10 domains, the nearest of all examples", nearest, "%", peers, None),
        Row("10 domains, 20 examples each", ours_few, "%", theirs_few, 83),
    ]


def _means(
    world: World, draws: Sequence[Mapping[str, Sequence[str]]], rows: Pairs
) -> tuple[float, float]:
    """Mean hits of both over some draws of the examples."""
    ours = [hits(world.ours(each), rows) for each in draws]
    theirs = [world.their_hits(each, rows) for each in draws]
    return float(np.mean(ours)), float(np.mean(theirs))


def pairs(world: World) -> list[Row]:
    """Two queries of different domains in one; no joiner is known to the router.

    Where semantic-router decides how many, both its routes must have a confidence of 0.5.
    """
    examples = grouped(world.broad("train"))
    router, theirs = world.ours(examples), world.theirs(examples)
    rows = joined(world.clinc["test"], world.domain, 600, seed=4)
    single = texts(world.clinc["test"])[::3]
    asked = [two_of(router, text) == routes for text, routes in rows]
    their_asked = [their_routes(theirs, text) == routes for text, routes in rows]
    free = [{*routed(router, text)} == routes for text, routes in rows]
    false = [len(routed(router, text)) > 1 for text in single]
    calibrate(theirs, world.broad("val"), world.clinc["oos_val"])
    their_free = [their_routes(theirs, text) == routes for text, routes in rows]
    their_false = [len(their_routes(theirs, text)) > 1 for text in single]
    return [
        Row(
            "two skills in one query, two asked for", percent(asked), "%", percent(their_asked), 85
        ),
        Row(
            "two skills in one query, the router decides",
            percent(free),
            "%",
            percent(their_free),
            65,
        ),
        Row(
            "false second adapter on single queries",
            percent(false),
            "%",
            percent(their_false),
            5,
            "lower",
        ),
        *timed(
            "one query of two skills",
            unread(router, world),
            unread_peer(examples, world),
            [text for text, _ in rows][::3],
            25,
        ),
    ]


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
    ours, theirs = _means(world, [grouped(world.clinc["train"])], rows)
    return [Row("CLINC150, 8 % of characters wrong", ours, "%", theirs, 80)]


def corrections(world: World) -> list[Row]:
    """From five examples a route, queries come by; errors alone are corrected, until there are 400.

    Both learn the corrected queries as examples of the right route after each 500 queries.
    """
    start, test = few(world.clinc["train"], 5, 0, named=True), world.clinc["test"]
    stream = [row for row in world.clinc["train"] if row[0] not in start[row[1]]]
    random.Random(0).shuffle(stream)
    ours = hits(corrected(world.ours, firsts, start, stream), test)
    theirs = their_hits(corrected(world.theirs, their_firsts, start, stream), test)
    work = f"CLINC150, 5 examples a route and {CORRECTIONS} corrections"
    return [Row(work, ours, "%", theirs, 90)]


def corrected(
    fit: Callable[[Mapping[str, Sequence[str]]], R],
    firsts: Callable[[R, Pairs], list[str]],
    start: Mapping[str, Sequence[str]],
    stream: Pairs,
) -> R:
    """The router that has learned the first CORRECTIONS queries of a stream that it got wrong."""
    examples = {route: [*group] for route, group in start.items()}
    router, left = fit(start), CORRECTIONS
    for rows in (stream[at : at + EVERY] for at in range(0, len(stream), EVERY)):
        chosen = zip(rows, firsts(router, rows), strict=True)
        wrong = [row for row, name in chosen if row[1] != name][:left]
        for text, route in wrong:
            examples[route].append(text)
        router, left = fit(examples), left - len(wrong)
        if not left:
            return router
    raise SystemExit(f"{left} corrections are left at the end of the stream.")


def plain(world: World) -> list[Row]:
    """Without a sentence encoder; semantic-router keeps its own."""
    examples, rows = grouped(world.clinc["train"]), world.clinc["test"]
    router = GateRouter.fit(examples, encoder=NgramEncoder(seams=True))
    theirs = world.their_hits(examples, rows)
    return [
        Row("CLINC150 on n-grams alone", hits(router, rows), "%", theirs, 92.5),
        *timed(
            "one query on n-grams alone", router, unread_peer(examples, world), texts(rows)[::15], 2
        ),
    ]


PARTS: dict[str, Callable[[World], list[Row]]] = {
    "full": full,
    "none": none,
    "few": few_shot,
    "broad": broad,
    "pairs": pairs,
    "typos": typos,
    "corrections": corrections,
    "joining": joining,
    "plain": plain,
    "speed": speed,
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], metavar="PART")
    parser.add_argument("--quick", action="store_true", help="one draw instead of three")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--cache", type=Path, help="keep the vectors in this .npz file")
    options = parser.parse_args()
    draws = 1 if options.quick else 3
    world = World(Memo(options.cache), clinc(), banking(), domains(), draws, {}, {})
    found: list[Row] = []
    for name in options.parts or PARTS:
        started = time.perf_counter()
        for row in PARTS[name](world):
            print(row, flush=True)
            found.append(row)
        world.memo.save()
        print(f"  {name} took {time.perf_counter() - started:.0f} s", flush=True)
    if options.json:
        rows = [row._asdict() | {"peer": PEER, "peer_figure": row.peer} for row in found]
        options.json.write_text(json.dumps({"rows": rows}, indent=2) + "\n", "utf-8")
