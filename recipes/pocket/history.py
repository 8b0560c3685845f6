"""What keeping the keys and values of another mix's turn does to the next answer.

Two turns of two tasks: the first is answered by its own expert, the second by its own, over a
history that is computed again (exact) or kept (`Request.history`).
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from loramix.base import open_base
from loramix.chat import Message
from loramix.engine import Answer, Request, Sampling
from loramix.engine.local import LocalEngine
from loramix.library import Library
from loramix.mix import Mix
from recipes.pocket.judge import MAX_TOKENS, answers, count
from recipes.pocket.tasks import TASKS, Task, load

HEAD = (
    f"{'turns':24} {'alone':>6} {'exact':>6} {'kept':>6} {'equal':>6} {'computed':>9} {'kept':>5}"
)


def run(data: Path, pocket: Path, rows: int) -> None:
    """Print a line for each pair of neighbouring tasks."""
    library = Library(pocket / "library")
    base = replace(open_base(str(pocket / "base"), device="cpu"), id="pocket")
    tasks = [load(name, data) for name in TASKS]
    print(HEAD)
    with LocalEngine(base, [library.load(name) for name in TASKS]) as engine:
        for first, second in zip(tasks, [*tasks[1:], tasks[0]], strict=True):
            print(line(engine, first, second, rows), flush=True)


def line(engine: LocalEngine, first: Task, second: Task, rows: int) -> str:
    """Exact matches in percent, then prompt tokens computed per second turn, then seconds."""
    openings = [example.query for example in first.heldout[:rows]]
    said = answers(engine, first.name, openings, [Mix({first.name: 1})] * rows)
    examples = second.heldout[:rows]
    mix = Mix({second.name: 1})
    alone = answers(engine, second.name, [e.query for e in examples], [mix] * rows)
    requests = [
        Request(
            (Message("user", opening), Message("assistant", reply), Message("user", e.query)),
            mix,
            Sampling(temperature=0, max_tokens=MAX_TOKENS[second.name]),
            history="keep",
        )
        for opening, reply, e in zip(openings, said, examples, strict=True)
    ]
    kept, kept_s = timed(engine, requests)  # first: an exact one would serve it afterwards
    exact, exact_s = timed(engine, [replace(request, history="exact") for request in requests])
    scores = [
        count(texts, examples).percent
        for texts in (alone, [a.text.strip() for a in exact], [a.text.strip() for a in kept])
    ]
    equal = 100 * sum(a.text == b.text for a, b in zip(exact, kept, strict=True)) / rows
    turns = f"{first.name}, {second.name}"
    return (
        f"{turns:24} {scores[0]:6.1f} {scores[1]:6.1f} {scores[2]:6.1f} {equal:6.1f} "
        f"{computed(exact):9.1f} {computed(kept):5.1f}  {exact_s:.1f} s, {kept_s:.1f} s"
    )


def timed(engine: LocalEngine, requests: list[Request]) -> tuple[list[Answer], float]:
    start = time.perf_counter()
    found = engine.generate(requests)
    return found, time.perf_counter() - start


def computed(found: list[Answer]) -> float:
    """Prompt tokens that had to be computed, on average."""
    return sum(a.num_prompt_tokens - a.num_cached_tokens for a in found) / len(found)
