"""How long the router keeps a query, or a new adapter, waiting, and semantic-router in turns."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from judged import Lookup, hits, in_turns, peer, routed, their_hits
from queries import few, grouped, texts
from semantic_router import IndexedRouter, Route
from semantic_router.index.local import LocalIndex
from threadpoolctl import threadpool_limits
from world import Row, World

from loramix.route import Router
from loramix.route.gate import GateRouter

NEWCOMER = "banking"


def speed(world: World) -> list[Row]:
    """One query end to end with the encoder, beside 1500 and beside 15 000 stored examples."""
    asked = texts(world.clinc["test"])[::15]
    few_rows, rows = (
        timed(f"one query, {150 * count} stored examples", *_both(world, count), asked, 10)
        for count in (10, 100)
    )
    (_, little, _, their_little, *_), (_, much, _, their_much, *_) = few_rows[0], rows[0]
    ratio = Row(
        "the same, times that with 1500",
        much / little,
        "x",
        their_much / their_little,
        1.1,
        "lower",
    )
    return [*rows, ratio]


def _both(world: World, count: int) -> tuple[GateRouter, IndexedRouter]:
    examples = few(world.clinc["train"], count, 0, named=False)
    return unread(world.ours(examples), world), unread_peer(examples, world)


def joining(world: World) -> list[Row]:
    """One of the ten domains joins the nine others by 100 examples, as `adapters add` has it join.

    semantic-router is given them in memory, and saves nothing.
    """
    examples = grouped(world.broad("train"))
    new = few(world.broad("train"), 100, 0, named=False)[NEWCOMER]
    del examples[NEWCOMER]
    theirs = unread_peer(examples, world)
    with TemporaryDirectory() as place, threadpool_limits(1):
        folder = Path(place) / "router"
        world.ours(examples).save(folder)
        start = time.perf_counter()
        joined = GateRouter.load(folder, encoder=world.memo.encoder).add(NEWCOMER, new)
        joined.save(folder)
        between = time.perf_counter()
        theirs.add(Route(name=NEWCOMER, utterances=new))
        spans = between - start, time.perf_counter() - between
    theirs.encoder = Lookup(memo=world.memo)
    test = world.broad("test")
    ours = hits(replace(joined, encoder=world.memo), test)
    work = "a tenth domain joins by 100 examples"
    return [
        Row(f"{work}: read, learned, saved", spans[0], "s", spans[1], 1.5, "lower"),
        Row(f"{work}: all ten", ours, "%", their_hits(theirs, test), None),
    ]


def timed(
    work: str, ours: Router, theirs: IndexedRouter, asked: Sequence[str], target: float
) -> list[Row]:
    """p50 and p95 of both, asked in turns; the target of p95 is two and a half times as long."""
    mine, peers = in_turns(asked, lambda text: routed(ours, text), theirs)
    return [
        Row(f"{work}, p50", mine[0], "ms", peers[0], target, "lower"),
        Row(f"{work}, p95", mine[1], "ms", peers[1], 2.5 * target, "lower"),
    ]


def unread(router: GateRouter, world: World) -> GateRouter:
    """The same router, remembering no vector."""
    return replace(router, encoder=world.memo.encoder)


def unread_peer(examples: Mapping[str, Sequence[str]], world: World) -> IndexedRouter:
    """semantic-router as it comes, remembering no vector either."""
    router = peer(examples, world.memo, LocalIndex())
    router.encoder = Lookup(memo=world.memo.encoder)
    return router
