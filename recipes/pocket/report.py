"""RESULTS.md: base, expert, routed and oracle on held-out rows, in one run of one command."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

import torch

from loramix.base import open_base
from loramix.engine.local import LocalEngine
from loramix.formats.card import write_card
from loramix.library import Library
from loramix.mix import Mix
from loramix.route.gate import GateRouter
from recipes.pocket import judge, routing
from recipes.pocket.judge import Score
from recipes.pocket.tasks import SOURCES, TASKS, Task, load

OTHERS = 200  # held-out rows on which the base and the other experts are tried
SAMPLED = (("support", 2), ("banking", 2), ("sentiment", 3), ("sql", 2), ("math", 2))


@dataclass(frozen=True, slots=True)
class Result:
    """What held-out rows of one task showed."""

    task: str
    n: int
    base: Score
    others: Mapping[str, Score]  # every other expert
    oracle: Score  # its own expert, named by the label
    fresh: Score  # the same, without rows that a training row asks alike
    routed: Score
    kept: Score  # queries that kept their own expert in the mix
    tfidf: Score


def run(data: Path, pocket: Path, out: Path, limit: int | None = None) -> None:
    """Judge everything and write RESULTS.md and the cards' scores."""
    library = Library(pocket / "library")
    router = GateRouter.load(library.folder / "_router")
    base = replace(open_base(str(pocket / "base"), device="cpu"), id="pocket")
    with LocalEngine(base, [library.load(name) for name in TASKS]) as engine:
        results = []
        for name in TASKS:
            task = load(name, data)
            task = replace(task, heldout=task.heldout[:limit])
            results.append(judged(engine, router, task))
            print(line(results[-1]), flush=True)
    strangers = routing.foreign(data)
    to_base = Score(sum(not router.route(routing.user(q)).mix for q in strangers), len(strangers))
    out.write_text(document(results, to_base), encoding="utf-8")
    for result in results:
        card = library.card(result.task)
        scores = {"exact_percent": round(result.oracle.percent, 1), "rows": result.n}
        write_card(replace(card, scores=scores), library.path(result.task))


def judged(engine: LocalEngine, router: GateRouter, task: Task) -> Result:
    """Everything about one task."""
    rows = list(task.heldout)
    own = Mix({task.name: 1})
    oracle = _answers(engine, task, [own] * len(rows))
    mixes = [router.route(routing.user(e.query)).mix for e in rows]
    routed = _routed(engine, task, mixes, own, oracle)
    fresh = judge.unseen(task)
    unseen = [row for row, take in zip(rows, fresh, strict=True) if take]
    return Result(
        task.name,
        len(rows),
        base=_score(engine, task, Mix()),
        others={t: _score(engine, task, Mix({t: 1})) for t in TASKS if t != task.name},
        oracle=judge.count(oracle, rows),
        fresh=judge.count([a for a, take in zip(oracle, fresh, strict=True) if take], unseen),
        routed=judge.count(routed, rows),
        kept=Score(sum(task.name in mix for mix in mixes), len(rows)),
        tfidf=judge.tfidf_score(task),
    )


def _routed(
    engine: LocalEngine, task: Task, mixes: Sequence[Mix], own: Mix, oracle: Sequence[str]
) -> list[str]:
    """Answers under the routed mixes; where that is the expert itself, its answer stands."""
    astray = [i for i, mix in enumerate(mixes) if mix != own]
    part = replace(task, heldout=tuple(task.heldout[i] for i in astray))
    found = dict(zip(astray, _answers(engine, part, [mixes[i] for i in astray]), strict=True))
    return [found.get(i, answer) for i, answer in enumerate(oracle)]


def _answers(engine: LocalEngine, task: Task, mixes: Sequence[Mix]) -> list[str]:
    return judge.answers(engine, task.name, [e.query for e in task.heldout], mixes)


def _score(engine: LocalEngine, task: Task, mix: Mix) -> Score:
    part = replace(task, heldout=task.heldout[:OTHERS])
    return judge.count(_answers(engine, part, [mix] * len(part.heldout)), part.heldout)


def line(result: Result) -> str:
    best = max(result.others.values(), key=lambda score: score.percent)
    return (
        f"{result.task}: n {result.n} base {result.base.percent:.1f} other {best.percent:.1f} "
        f"oracle {result.oracle.percent:.1f} fresh {result.fresh.percent:.1f} "
        f"routed {result.routed.percent:.1f} kept {result.kept.percent:.1f} "
        f"tfidf {result.tfidf.percent:.1f}"
    )


def document(results: Sequence[Result], to_base: Score) -> str:
    kept = Score(sum(r.kept.hits for r in results), sum(r.n for r in results))
    ratios = [r.routed.percent / r.oracle.percent for r in results]
    return f"""# Pocket: what its experts and its router are worth

Made by `python -m recipes.pocket report` with torch {torch.__version__} on {platform.machine()},
{torch.get_num_threads()} threads. Exact match of the whole greedy answer, in percent, on held-out
rows. Brackets hold 95 % intervals (Wilson). *Oracle* is a task's own expert, chosen by the label;
*routed* is the mix the router chose from the query alone. The base and the other experts were
tried on the first {OTHERS} held-out rows.

| task | n | base | best other expert | expert (oracle) | routed | routed / oracle |
|---|---|---|---|---|---|---|
{chr(10).join(_row(r) for r in results)}

Routed over oracle, macro-averaged: **{100 * mean(ratios):.1f} %**, the lowest task
{100 * min(ratios):.1f} %.

| | share | n |
|---|---|---|
| in-domain queries whose mix keeps their own expert | {_cell(kept)} | {kept.n} |
| CLINC150 out-of-scope queries answered by the base | {_cell(to_base)} | {to_base.n} |

## Beside a classic baseline

TF-IDF (words and word pairs) with logistic regression, the {judge.CLASSES} commonest answers as
classes, fitted on the same training rows. *Unseen* leaves out held-out rows that a training row
asks alike, digits and case aside.

| task | seen alike | expert, all | expert, unseen only | TF-IDF + LR | expert / TF-IDF |
|---|---|---|---|---|---|
{chr(10).join(_baseline(r) for r in results)}

The base reads unlabelled text. No held-out row is a line of it (`corpus.require_unseen`), from
whichever collection it comes.

## Data

{chr(10).join(f"- **{name}**: {SOURCES[name]}" for name in TASKS)}
"""


def _row(r: Result) -> str:
    name, other = max(r.others.items(), key=lambda item: item[1].percent)
    ratio = 100 * r.routed.percent / r.oracle.percent
    return (
        f"| {r.task} | {r.n} | {_cell(r.base)} | {name} {_cell(other)} | {_cell(r.oracle)} "
        f"| {_cell(r.routed)} | {ratio:.1f} % |"
    )


def _baseline(r: Result) -> str:
    seen = 100 * (1 - r.fresh.n / r.n)
    return (
        f"| {r.task} | {seen:.1f} % | {_cell(r.oracle)} | {_cell(r.fresh)} | {_cell(r.tfidf)} "
        f"| {r.oracle.percent / max(r.tfidf.percent, 0.1):.2f} |"
    )


def _cell(score: Score) -> str:
    low, high = score.interval
    return f"{score.percent:.1f} [{low:.1f}, {high:.1f}]"


def write_queries(data: Path, pocket: Path) -> None:
    """The demo's dozen: held-out rows at equal steps through each task, and a stranger."""
    lines = []
    for name, count in SAMPLED:
        rows = [e for e in load(name, data).heldout if routing.may_ship(e, data)]
        for index in range(count):
            row = rows[(2 * index + 1) * len(rows) // (2 * count)]
            lines.append({"task": name, "query": row.query, "reference": row.answer})
    lines.append({"task": "none", "query": routing.foreign(data)[500], "reference": ""})
    text = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in lines)
    (pocket / "queries.jsonl").write_text(text, encoding="utf-8")
