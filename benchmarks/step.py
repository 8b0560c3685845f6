"""Where the time of a decode step goes, by what it is spent on.

    pip install -r benchmarks/requirements.txt
    python benchmarks/step.py [--quick] [--json FILE] [--no-tiles]

The engine's benchmark's model, threads and mixes (engine.py). Modules are timed from outside, each
without those inside it; a step's median over the steps of a run, and the median of the runs. The
clocks themselves take about a millisecond of a step.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import engine as peers
import material
import torch

from loramix.engine.local import LocalEngine
from loramix.frozen import FrozenLinear
from loramix.mix import Mix
from loramix.mixed import MixedLinear

WHOLE = "the whole step"
REST = "scheduling, sampling, reading"
LINEAR = (MixedLinear, FrozenLinear, torch.nn.Linear)  # an update is summed with its base's product
NAMES = {"attn": "attention", "norm": "norms", "rotary": "positions", "mlp": "activations"}


class Clock:
    """Seconds of each step by kind; what runs inside another kind is not the other's."""

    def __init__(self) -> None:
        self.steps: list[Counter[str]] = []
        self._open: list[tuple[str, float]] = []

    def enter(self, kind: str) -> None:
        now = time.perf_counter()
        self._charge(now)
        self._open.append((kind, now))

    def leave(self) -> None:
        now = time.perf_counter()
        self._charge(now)
        self._open.pop()
        if self._open:
            self._open[-1] = (self._open[-1][0], now)

    def _charge(self, now: float) -> None:
        """What ran until now is whose clock was on last."""
        if self._open:
            kind, since = self._open[-1]
            self.steps[-1][kind] += now - since


def kind_of(name: str, module: Any, head: Any) -> str:
    if module is head:
        return "logits"
    if isinstance(module, LINEAR):
        return "linear layers"
    last = name.rpartition(".")[2]
    return next((words for part, words in NAMES.items() if part in last), "the rest of the model")


def watch(engine: LocalEngine, clock: Clock) -> list[Any]:
    """Time the engine's modules and steps from now on; returns what undoes it."""
    model = engine.base.model
    head = model.get_output_embeddings()
    undo = []
    for name, module in model.named_modules():
        kind = kind_of(name, module, head)
        undo.append(module.register_forward_pre_hook(lambda *_, kind=kind: clock.enter(kind)))
        undo.append(module.register_forward_hook(lambda *_: clock.leave()))
    core = engine._core
    step = core._step

    def timed() -> None:
        clock.steps.append(Counter())
        clock.enter(REST)
        step()
        clock.leave()

    core._step = timed  # type: ignore[method-assign]
    return undo


def milliseconds(engine: LocalEngine, mixes: Sequence[Mix]) -> dict[str, float]:
    """Medians over the decode steps of one run."""
    answer = peers.Ours(engine).under(mixes)
    rows = peers.prompts(len(mixes), peers.SHORT)
    answer(rows, 20)  # the layers suit the batch, siblings have met
    clock = Clock()
    undo = watch(engine, clock)
    answer(rows, 1 + peers.STEPS)
    for hook in undo:
        hook.remove()
    del engine._core._step  # the class's own again
    decoding = clock.steps[-peers.STEPS :]
    kinds = {kind for step in decoding for kind in step}
    found = {kind: 1000 * median(step[kind] for step in decoding) for kind in kinds}
    return found | {WHOLE: 1000 * median(step.total() for step in decoding)}


def measured(runs: int, tiles: bool | None) -> dict[str, dict[str, float]]:
    model = material.random_model()
    adapters = [material.random_adapter(model, f"a{n}", seed=n) for n in range(peers.BATCH)]
    found: dict[str, list[dict[str, float]]] = {}
    with LocalEngine(material.base_of(model), adapters, reuse=False, tiles=tiles) as engine:
        for _ in range(runs):
            for count in (1, peers.BATCH):
                for kind, mixes in (("mix", peers.two_each(count)), ("bare", [Mix()] * count)):
                    name = f"{count} {kind}"
                    found.setdefault(name, []).append(milliseconds(engine, mixes))
    return {
        name: {kind: median(run.get(kind, 0.0) for run in runs) for kind in runs[0]}
        for name, runs in found.items()
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="three runs instead of nine")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--no-tiles", dest="tiles", action="store_false", default=None)
    options = parser.parse_args()
    torch.set_num_threads(peers.THREADS)
    table = measured(3 if options.quick else 9, options.tiles)
    kinds = sorted(table["8 mix"], key=lambda kind: -table["8 mix"][kind])
    print(f"{'ms of a step':32}" + "".join(f"{name:>10}" for name in table))
    for kind in kinds:
        print(f"{kind:32}" + "".join(f"{run.get(kind, 0.0):10.1f}" for run in table.values()))
    if options.json:
        rows = [
            {
                "work": f"{name}: {kind}",
                "figure": round(value, 2),
                "unit": "ms of a step",
                "peer": WHOLE,
                "target": None,
                "better": "lower",
            }
            for name, run in table.items()
            for kind, value in run.items()
        ]
        options.json.write_text(json.dumps({"rows": rows}, indent=2) + "\n", "utf-8")
