"""Searching weights: trials per second against PEFT, and the gradient against hill climbing.

    pip install -r benchmarks/requirements.txt
    LORAMIX_DATA=... python benchmarks/search.py [--quick] [--json FILE]

A trial is the loss of one mix on the same rows. PEFT makes a new adapter for each by
`add_weighted_adapter` (`cat`, exact, or `svd`, its default, to the rank of one adapter), activates
it, runs the same passes and deletes it; here a trial is a row of gates. Both compute the output
layer at the answers' tokens alone. Pocket has its five experts and real held-out rows; the larger
model is random (12 layers of 768, five adapters of rank 16 on all linear layers). Peers take turns;
medians.

The time to hill climbing's loss counts everything from the first start on, on pocket, on rows of
two tasks that no single expert knows. Hill climbing is let run until it hardly gains any more, and
its loss is looked at on the way: the longer it climbs, the further it falls behind. The planted mix
is what rows were drawn from at random: it is known what is to be found.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "2")

import numpy as np
import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))  # for recipes

from loramix.adapter import Adapter, Card
from loramix.base import Base, fingerprint, open_base
from loramix.chat import Example
from loramix.folders import POCKET_LIBRARY
from loramix.formats import peft
from loramix.library import Library
from loramix.lora import Pair
from loramix.mixed import linear_shapes
from loramix.search import Found, Progress
from loramix.search.find import find
from loramix.search.gates import GateLoss, Row
from recipes.pocket.tasks import load

ROWS = 40  # of each task
HILL = (100, 200, 400)  # trials
WIDTH, LAYERS, RANK, COUNT = 768, 12, 16, 5


def examples(*tasks: str) -> list[Example]:
    found: list[Example] = []
    for task in tasks:
        rows = list(load(task, Path(os.environ["LORAMIX_DATA"])).heldout)
        random.Random(0).shuffle(rows)
        found += rows[:ROWS]
    return found


def mid_sized(base: Base) -> Base:
    """Random, with pocket's tokens."""
    torch.manual_seed(0)
    shape = {
        "vocab_size": 6144,
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": WIDTH // 64,
        "max_position_embeddings": 1024,
    }
    model = LlamaForCausalLM(LlamaConfig(**shape)).eval().requires_grad_(False)
    return Base("random-110m", model, base.tokenizer, fingerprint(model))


def random_adapters(base: Base, folder: Path) -> list[Adapter]:
    found = []
    for n in range(COUNT):
        generator = torch.Generator().manual_seed(n)
        pairs = {
            name: Pair(
                torch.randn(RANK, into, generator=generator) * into**-0.5,
                torch.randn(out, RANK, generator=generator) * 0.02,
            )
            for name, (out, into) in linear_shapes(base.model).items()
            if name != "lm_head"
        }
        adapter = Adapter(f"a{n}", pairs, peft.digest(pairs), Card(f"a{n}", base=base.id))
        peft.write(adapter, folder / adapter.name)
        found.append(adapter)
    return found


class Peer:
    """PEFT: a merged adapter for each trial."""

    def __init__(self, base: Base, folder: Path, names: Sequence[str], rows: list[Row]) -> None:
        first, *others = names
        self.model = PeftModel.from_pretrained(base.model, folder / first, adapter_name=first)
        for name in others:
            self.model.load_adapter(folder / name, adapter_name=name)
        self.model.eval()
        self.names = list(names)
        self.loss = GateLoss(base, [], [])  # its passes, without gates
        self.loss.rows = rows

    def trial(self, weights: Sequence[float], how: str) -> float:
        rank = {"svd_rank": RANK, "svd_full_matrices": False} if how == "svd" else {}
        self.model.add_weighted_adapter(
            self.names, list(weights), "trial", combination_type=how, **rank
        )
        self.model.set_adapter("trial")
        try:
            rows = range(len(self.loss.rows))
            return float(self.loss.losses(np.zeros((1, 0)), rows).sum())
        finally:
            self.model.delete_adapter("trial")


def rate(work: Callable[[], object], count: int) -> float:
    start = time.perf_counter()
    work()
    return count / (time.perf_counter() - start)


def trials(name: str, base: Base, adapters: list[Adapter], folder: Path, rows: Any, repeats: int):
    """Trials per second of ours and both of PEFT's, in turns."""
    points = np.random.default_rng(0).uniform(0.1, 0.5, (8, len(adapters)))
    rates: dict[str, list[float]] = {"gates": [], "cat": [], "svd": []}
    for n in range(repeats + 1):
        with GateLoss(base, adapters, rows) as loss:
            every = range(len(loss.rows))
            ours = rate(lambda: loss.losses(points, every), len(points))  # noqa: B023
            sums = loss.losses(points[:1], every).sum()
        peer = Peer(base, folder, [a.name for a in adapters], loss.rows)
        cat = rate(lambda: peer.trial(points[0], "cat"), 1)  # noqa: B023
        assert abs(peer.trial(points[0], "cat") / sums - 1) < 1e-3, "cat is exact, and so are gates"
        svd = rate(lambda: peer.trial(points[0], "svd"), 1)  # noqa: B023
        base.model.__dict__.pop("peft_config", None)
        peer.model.unload()
        if n:  # the first round warms up
            for key, value in (("gates", ours), ("cat", cat), ("svd", svd)):
                rates[key].append(value)
    found = {key: median(values) for key, values in rates.items()}
    for key, value in found.items():
        print(
            f"  {name:8} {key:6} {value:9.3f} trials/s   ours x {found['gates'] / value:.1f}",
            flush=True,
        )
    return found


class Step(NamedTuple):
    """A report of a search: what it took, and the best loss on the search rows."""

    seconds: float
    trials: float
    loss: float


def curve(
    loss: GateLoss, rows: Sequence[Example], method: str, budget: float
) -> tuple[list[Step], Found]:
    seen: list[Step] = []
    start = time.perf_counter()

    def report(progress: Progress) -> None:
        seen.append(Step(time.perf_counter() - start, progress.spent, progress.loss))

    found = find(loss, [row.query for row in rows], method=method, budget=budget, report=report)
    return seen, found


def descent(
    base: Base, adapters: list[Adapter], rows: list[Example], turns: int
) -> dict[int, tuple[float, float]]:
    """Median seconds until hill climbing's loss after some trials, its own and the gradient's."""
    found: dict[int, list[tuple[float, float]]] = {trials: [] for trials in HILL}
    with GateLoss(base, adapters, rows) as loss:
        for method in ("hill", "gradient"):
            curve(loss, rows, method, 10)  # warms up
        for _ in range(turns):
            climbed, top = curve(loss, rows, "hill", max(HILL))
            steps, end = curve(loss, rows, "gradient", max(HILL))
            for trials, seconds in found.items():
                goal = min(step.loss for step in climbed if step.trials <= trials)
                seconds.append((until(goal, climbed), until(goal, steps)))
                print(f"  loss {goal:.4f} of {trials} trials: hill {seconds[-1][0]:.1f} s, "
                      f"gradient {seconds[-1][1]:.1f} s")  # fmt: skip
            for method, last, held in (("hill", climbed[-1], top), ("gradient", steps[-1], end)):
                print(f"  {method} ends at {last.loss:.4f} in {last.seconds:.1f} s, "
                      f"held out {held.loss:.4f}", flush=True)  # fmt: skip
    return {
        trials: (median(hill for hill, _ in seconds), median(ours for _, ours in seconds))
        for trials, seconds in found.items()
    }


def until(goal: float, steps: Sequence[Step]) -> float:
    """Seconds until a loss no higher."""
    return next(step.seconds for step in steps if step.loss <= goal)


def planted(base: Base, adapters: Sequence[Adapter], weights: Sequence[float]) -> float:
    """How far the worst of the found weights is from what rows were drawn under, as a share."""
    model = copy.deepcopy(base.model)
    for adapter, weight in zip(adapters, weights):
        for layer, pair in adapter.pairs.items():
            model.get_submodule(layer).weight.data += weight * pair.delta()
    torch.manual_seed(0)
    start = torch.randint(6, 200, (256, 2))
    options = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0}
    ids = model.generate(start, max_new_tokens=64, min_new_tokens=64, eos_token_id=None, **options)
    with GateLoss(base, adapters, []) as loss:
        loss.rows = [Row(tuple(row), 2) for row in ids.tolist()]
        found = find(loss, [row.ids for row in loss.rows], method="gradient")
    off = max(abs(found.point[n] / weight - 1) for n, weight in enumerate(weights))
    print(f"  planted {weights}, found {[round(x, 4) for x in found.point]}", flush=True)
    return off


def row(work: str, figure: float, peer: str, target: float | None, better: str) -> Any:
    """A ratio against the peer."""
    return {
        "work": work,
        "figure": round(figure, 4),
        "unit": "x",
        "peer": peer,
        "target": target,
        "better": better,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--part", choices=("trials", "descent", "planted"), help="only this")
    options = parser.parse_args()
    base = open_base()
    shelf = Library(POCKET_LIBRARY)
    experts = [shelf.load(name) for name in shelf.names()]
    both = examples("support", "banking")
    found: list[Any] = []
    repeats = 1 if options.quick else 3
    if options.part in (None, "trials"):
        with tempfile.TemporaryDirectory() as folder:
            made = trials("pocket", base, experts, POCKET_LIBRARY, both[20:60], repeats)
            mid = mid_sized(base)
            adapters = random_adapters(mid, Path(folder))
            larger = trials("110M", mid, adapters, Path(folder), both[36:44], 1)
        for name, rates in (("pocket", made), ("110M", larger)):
            for peer in ("cat", "svd"):
                ratio = rates["gates"] / rates[peer]
                found.append(row(f"trials/s, {name}", ratio, f"PEFT {peer}", None, "higher"))
    if options.part in (None, "descent"):
        for climbing, (hill, gradient) in descent(base, experts, both, repeats).items():
            work = f"time of the gradient to the loss of {climbing} trials"
            target = 0.1 if climbing == max(HILL) else None
            found.append(row(work, gradient / hill, "hill climbing", target, "lower"))
    if options.part in (None, "planted"):
        two = [shelf.load("banking"), shelf.load("support")]
        off = planted(base, two, (0.6, 0.4))
        work = "gradient: a planted weight off by"
        found.append(row(work, off, "what was planted", 0.02, "lower"))
    if options.json:
        options.json.write_text(json.dumps({"rows": found}, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
