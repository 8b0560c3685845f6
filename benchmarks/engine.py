"""Mixes in one batch: the engine against its own bare base, PEFT, transformers and llama.cpp.

    pip install -r benchmarks/requirements.txt
    python benchmarks/engine.py [--quick] [--json FILE]

Random weights of Qwen3-0.6B's shape in bfloat16, two threads; adapters of rank 16 on all seven
linear layers. Everybody gets the same prompts, weights and precision, in turns; medians of the
rounds. A decode rate counts the steps after the first token, so no prefill is in it.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "2")

import material
import torch
from gguf import GGMLQuantizationType
from transformers import ContinuousBatchingConfig, GenerationConfig

from loramix.adapter import Adapter
from loramix.engine import Request, Sampling
from loramix.engine.local import LocalEngine
from loramix.formats import peft
from loramix.lora import size_bytes
from loramix.mix import Mix

THREADS = 2
BATCH = 8
SHORT, LONG = 32, 512  # tokens of a prompt
STEPS = 32  # decode steps that are timed

Prompts = Sequence[Sequence[int]]


@dataclass
class Table:
    """Figures by name; each is measured once a round, and its median counts."""

    figures: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, value: float) -> None:
        self.figures.setdefault(name, []).append(value)
        print(f"  {name:44} {value:9.2f}", flush=True)

    def median(self, name: str) -> float | None:
        return median(self.figures[name]) if name in self.figures else None

    def ratio(self, name: str, peer: str) -> float | None:
        ours, theirs = self.median(name), self.median(peer)
        return None if ours is None or not theirs else ours / theirs


def prompts(count: int, length: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(300, 150_000, (count, length), generator=generator)
    return [[int(token) for token in row] for row in drawn]


def seconds(work: Callable[[], object]) -> float:
    gc.collect()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def decode_rate(answer: Callable[[Prompts, int], object], rows: Prompts) -> float:
    """Tokens per second of all rows together, from the second token on."""
    first = seconds(lambda: answer(rows, 1))
    both = seconds(lambda: answer(rows, 1 + STEPS))
    return len(rows) * STEPS / (both - first)


class Ours:
    """The engine; a mix for each row, or none."""

    def __init__(self, engine: LocalEngine) -> None:
        self.engine = engine

    def under(self, mixes: Sequence[Mix]) -> Callable[[Prompts, int], object]:
        def answer(rows: Prompts, num_tokens: int) -> object:
            sampling = Sampling(temperature=0, max_tokens=num_tokens)
            return self.engine.generate(
                [Request(tuple(row), mix, sampling) for row, mix in zip(rows, mixes, strict=True)]
            )

        return answer


def pefts(model: Any, folder: Path) -> Callable[[Prompts, int], object]:
    """PEFT's mixed batch: one adapter for each row."""
    from peft import PeftModel

    wrapped = PeftModel.from_pretrained(model, str(folder / "a0"), adapter_name="a0")
    for n in range(1, BATCH):
        wrapped.load_adapter(str(folder / f"a{n}"), adapter_name=f"a{n}")
    return static_batch(wrapped.eval(), adapter_names=[f"a{n}" for n in range(BATCH)])


def static_batch(model: Any, **options: object) -> Callable[[Prompts, int], object]:
    """All rows from one `generate`; `options` go to it."""

    def answer(rows: Prompts, num_tokens: int) -> object:
        ids = torch.tensor(rows)
        with torch.inference_mode():
            return model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=num_tokens,
                do_sample=False,
                **options,
            )

    return answer


def continuous_batch(model: Any) -> Callable[[Prompts, int], object]:
    """Transformers' own, in the small sizes that a CPU needs: its defaults take minutes."""
    config = ContinuousBatchingConfig(
        page_size=16, num_blocks=256, max_batch_tokens=512, allow_block_sharing=False
    )

    def answer(rows: Prompts, num_tokens: int) -> object:
        generation = GenerationConfig(max_new_tokens=num_tokens, do_sample=False, eos_token_id=-1)
        found = model.generate_batch(
            [list(row) for row in rows],
            generation_config=generation,
            continuous_batching_config=config,
        )
        assert all(len(one.generated_tokens) == num_tokens for one in found.values())
        return found

    return answer


class Llama:
    """llama.cpp's server in this process; scales for each request."""

    def __init__(self, path: Path, adapters: Sequence[Path]) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_parallel = BATCH
        params.n_ctx = BATCH * 2 * (LONG + STEPS)
        params.cpuparams.n_threads = THREADS
        params.cpuparams_batch.n_threads = THREADS
        params.cache_ram_mib = 0
        params.lora_init_without_apply = True
        params.lora_adapters = [
            xllamacpp.CommonAdapterLoraInfo(str(adapter), 0.0) for adapter in adapters
        ]
        params.verbosity = 0
        self.system = xllamacpp.get_system_info()
        self.server = xllamacpp.Server(params)

    def under(self, mixes: Sequence[Mix]) -> Callable[[Prompts, int], object]:
        def one(row: Sequence[int], mix: Mix, num_tokens: int) -> object:
            scales = [{"id": int(name[1:]), "scale": weight} for name, weight in mix.items()]
            answer = self.server.handle_completions(
                {
                    "prompt": list(row),
                    "max_tokens": num_tokens,
                    "temperature": 0.0,
                    "ignore_eos": True,
                    "cache_prompt": False,
                    "lora": scales,
                }
            )
            assert answer["usage"]["completion_tokens"] == num_tokens, answer
            return answer

        def answer(rows: Prompts, num_tokens: int) -> object:
            with ThreadPoolExecutor(len(rows)) as pool:
                return list(pool.map(one, rows, mixes, [num_tokens] * len(rows)))

        return answer


def two_each(count: int, adapters: int = BATCH) -> list[Mix]:
    """Distinct mixes of two adapters each."""
    return [
        Mix({f"a{n % adapters}": 0.45, f"a{(n + 1 + n // adapters) % adapters}": 0.55})
        for n in range(count)
    ]


def byte_limit(adapters: Sequence[Adapter], ours: LocalEngine, rows: int) -> float:
    """(base + KV) / (base + KV + adapters in the batch): what reading memory alone allows."""
    weights = sum(t.numel() * t.element_size() for t in ours.base.model.parameters())
    kv = rows * (SHORT + STEPS // 2) * ours.token_bytes
    extra = sum(size_bytes(adapter.pairs.values()) for adapter in adapters)
    return (weights + kv) / (weights + kv + extra)


def hot_adds(ours: LocalEngine, spare: Sequence[Adapter]) -> tuple[float, float]:
    """Adds while eight requests decode: steps until usable, and the slowest step over the median.

    Steps are told apart by the pre-hook of the first layer.
    """
    starts: list[float] = []
    layer = ours.base.model.model.layers[0]
    hook = layer.register_forward_pre_hook(lambda *_: starts.append(time.perf_counter()))
    answer = Ours(ours).under(two_each(BATCH))
    thread = threading.Thread(target=answer, args=(prompts(BATCH, SHORT, 5), 6 * len(spare)))
    thread.start()
    waits = []
    while len(starts) < 4:
        time.sleep(0.01)
    quiet = len(starts)
    for adapter in spare:
        before = len(starts)
        ours.add(adapter)
        waits.append(len(starts) - before)
        while len(starts) < before + 4:
            time.sleep(0.005)
    end = len(starts)
    thread.join()
    hook.remove()
    for adapter in spare:
        ours.remove(adapter.name)
    gaps = [b - a for a, b in pairwise(starts)][quiet:end]
    return float(max(waits)), max(gaps) / median(gaps)


def measure(table: Table, rounds: int, folder: Path) -> float:
    """Fill the table; returns the byte limit of decoding under mixes."""
    model = material.random_model()
    adapters = [material.random_adapter(model, f"a{n}", seed=n) for n in range(64)]
    for adapter in adapters[:BATCH]:
        peft.write(adapter, folder / adapter.name)
        material.write_gguf_adapter(adapter, folder / f"{adapter.name}.gguf")
    material.write_gguf(model, folder / "bf16.gguf", GGMLQuantizationType.BF16)
    material.write_gguf(model, folder / "q8_0.gguf", GGMLQuantizationType.Q8_0)
    files = [folder / f"a{n}.gguf" for n in range(BATCH)]

    peer_models = [material.same_weights(model) for _ in range(3)]  # before ours wraps its layers
    mixed = pefts(peer_models[0], folder)
    static, continuous = static_batch(peer_models[1]), continuous_batch(peer_models[2])
    engine = LocalEngine(material.base_of(model), adapters[:BATCH], reuse=False, max_batch=32)
    ours, bare = Ours(engine), [Mix()] * 32
    llama = {kind: Llama(folder / f"{kind}.gguf", files) for kind in ("bf16", "q8_0")}
    print(next(iter(llama.values())).system)

    short, one, burst = prompts(BATCH, SHORT), prompts(1, SHORT), prompts(BATCH, LONG, 1)
    ways = {
        "ours, 8 mixes": (ours.under(two_each(BATCH)), short),
        "ours, bare base": (ours.under(bare[:BATCH]), short),
        "PEFT, one adapter each": (mixed, short),
        "transformers, static batch": (static, short),
        "transformers, continuous": (continuous, short),
        "llama.cpp bf16, 8 mixes": (llama["bf16"].under(two_each(BATCH)), short),
        "llama.cpp Q8_0, 8 mixes": (llama["q8_0"].under(two_each(BATCH)), short),
        "ours, 1 mix": (ours.under(two_each(1)), one),
        "ours, bare, 1": (ours.under(bare[:1]), one),
        "llama.cpp bf16, 1 mix": (llama["bf16"].under(two_each(1)), one),
    }
    for number in range(rounds):
        print(f"round {number + 1} of {rounds}")
        for name, (answer, rows) in ways.items():
            table.add(name, decode_rate(answer, rows))
        for name, mixes in (("prefill, 8 mixes", two_each(BATCH)), ("prefill, bare", bare[:BATCH])):
            answer = ours.under(mixes)
            table.add(name, BATCH * LONG / seconds(lambda answer=answer: answer(burst, 1)))
        for count in (1, 2, 4, 8, 16, 32):
            rate = decode_rate(ours.under(two_each(count)), prompts(count, SHORT, 2))
            table.add(f"ours, {count} at once", rate)
        for adapter in adapters[BATCH:]:
            engine.add(adapter)
        table.add("ours, 8 mixes, 64 resident", decode_rate(ours.under(two_each(BATCH)), short))
        table.add("ours, 8 mixes, again", decode_rate(ours.under(two_each(BATCH)), short))
        for adapter in adapters[BATCH:]:
            engine.remove(adapter.name)
        waits, slowest = hot_adds(engine, adapters[BATCH : BATCH + 20])
        table.add("hot add, steps until usable", waits)
        table.add("hot add, slowest step / median", slowest)
    limit = byte_limit(adapters[:BATCH], engine, BATCH)
    engine.close()
    return limit


def rows(table: Table, limit: float) -> list[dict[str, object]]:
    def row(
        work: str, figure: float | None, peer: str, target: float | None, better: str = "higher"
    ) -> dict[str, object]:
        rounded = None if figure is None else round(figure, 3)
        return {
            "work": work,
            "figure": rounded,
            "unit": "x",
            "peer": peer,
            "target": target,
            "better": better,
        }

    eight = "ours, 8 mixes"
    against = table.ratio(eight, "ours, bare base")
    counts = (1, 2, 4, 8, 16, 32)
    rates = [table.median(f"ours, {count} at once") or 0.0 for count in counts]
    steps = [b / a for a, b in pairwise(rates)]
    return [
        row(
            f"decode 8 mixes, of the byte limit {limit:.3f}",
            against and against / limit,
            "ours, bare base",
            0.93,
        ),
        row("decode 8 mixes", table.ratio(eight, "PEFT, one adapter each"), "PEFT", 2.5),
        row("decode 8 mixes", table.ratio(eight, "llama.cpp bf16, 8 mixes"), "llama.cpp bf16", 2.5),
        row(
            "decode 8 mixes", table.ratio(eight, "llama.cpp Q8_0, 8 mixes"), "llama.cpp Q8_0", None
        ),
        row("decode 1 mix", table.ratio("ours, 1 mix", "ours, bare, 1"), "ours, bare base", 0.85),
        row(
            "decode 1 mix",
            table.ratio("ours, 1 mix", "llama.cpp bf16, 1 mix"),
            "llama.cpp bf16",
            0.9,
        ),
        row(
            "prefill 8 x 512", table.ratio("prefill, 8 mixes", "prefill, bare"), "ours, bare", 0.85
        ),
        row(
            "decode 8 bare",
            table.ratio("ours, bare base", "transformers, static batch"),
            "transformers, static batch",
            1.0,
        ),
        row(
            "decode 8 bare",
            table.ratio("ours, bare base", "transformers, continuous"),
            "transformers, continuous batching",
            1.3,
        ),
        row(
            "decode 8 mixes, 64 adapters resident",
            table.ratio("ours, 8 mixes, 64 resident", eight),
            "ours, 8 resident",
            0.95,
        ),
        row("tokens/s at twice the requests, least of 1 to 32", min(steps), "half as many", 1.0),
        row(
            "hot add, steps until usable, worst of 20",
            table.median("hot add, steps until usable"),
            "decode steps",
            2,
            "lower",
        ),
        row(
            "hot add, slowest step",
            table.median("hot add, slowest step / median"),
            "median step",
            1.15,
            "lower",
        ),
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round instead of five")
    parser.add_argument("--json", type=Path, help="write the rows here")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    table = Table()
    with tempfile.TemporaryDirectory() as place:
        limit = measure(table, 1 if options.quick else 5, Path(place))
    found = rows(table, limit)
    for entry in found:
        target = "" if entry["target"] is None else f"(target {entry['target']})"
        print(f"{entry['work']:52} {entry['figure']} x {entry['peer']} {target}")
    if options.json:
        options.json.write_text(json.dumps({"rows": found}, indent=2) + "\n", "utf-8")
