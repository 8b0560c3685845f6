"""Mixes in one batch: the engine against its own bare base, PEFT, transformers and llama.cpp.

    pip install -r benchmarks/requirements.txt
    python benchmarks/engine.py [--quick] [--json FILE] [--plot FILE] [--native LLAMA_SERVER]
                                [--no-tiles]

Random weights of Qwen3-0.6B's shape in bfloat16, two threads; adapters of rank 16 on all seven
linear layers. Everybody gets the same prompts, weights and precision, in turns; medians of the
rounds. A decode rate counts the steps after the first token, so no prefill is in it.

llama.cpp runs in processes of its own (llama.py): in ours, its OpenMP threads would be managed with
torch's, which then stop spinning (see loramix/engine/threads.py), and each would slow the other
down. The wheel is built for AVX2; `--native` measures a build for this very CPU beside it, which
native_llama.sh makes. The memory figure comes from a process that does nothing else.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "2")

import material
import torch
from gguf import GGMLQuantizationType
from hot import Told, stalls
from transformers import ContinuousBatchingConfig, GenerationConfig

from loramix.adapter import Adapter
from loramix.engine import Request, Sampling
from loramix.engine.local import LocalEngine
from loramix.formats import peft
from loramix.lora import size_bytes
from loramix.mix import Mix

HERE = Path(__file__).parent
THREADS = 2
BATCH = 8
SHORT, LONG = 32, 512  # tokens of a prompt
STEPS = 32  # decode steps that are timed
REPEATS = 3  # in a round, in turns, of what takes seconds: a shared machine is unsteady
COUNTS = (1, 2, 4, 8, 16, 32)  # requests at once
KV_BYTES = 512 << 20  # of the engine whose memory is measured
NATIVE = "bf16, built for this CPU"

Prompts = Sequence[Sequence[int]]
Answers = Callable[[Prompts, int], tuple[float, float]]  # -> wall and CPU seconds


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


def decode_rate(answer: Answers, rows: Prompts) -> tuple[float, float]:
    """Tokens per second of all rows together, from the second token on, and CPU seconds a token.

    After a first run that counts for nobody: whoever adapts to the work has done so by then.
    """
    answer(rows, 20)
    first, first_cpu = answer(rows, 1)
    both, both_cpu = answer(rows, 1 + STEPS)
    count = len(rows) * STEPS
    return count / (both - first), (both_cpu - first_cpu) / count


def timed(answer: Callable[[Prompts, int], object]) -> Answers:
    """Runs in this process."""

    def run(rows: Prompts, num_tokens: int) -> tuple[float, float]:
        cpu = time.process_time()
        wall = seconds(lambda: answer(rows, num_tokens))
        return wall, time.process_time() - cpu

    return run


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
    """llama.cpp's server in a process of its own; scales for each request."""

    def __init__(self, path: Path, adapters: Sequence[Path], native: Path | None = None) -> None:
        room = BATCH * 2 * (LONG + STEPS)
        command = [sys.executable, HERE / "llama.py", path, str(BATCH), str(room), str(THREADS)]
        command += [*adapters, *(["--native", native] if native else [])]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.system = str(self._read()["system"])

    def under(self, mixes: Sequence[Mix]) -> Answers:
        scales = [
            [{"id": int(name[1:]), "scale": weight} for name, weight in mix.items()]
            for mix in mixes
        ]

        def run(rows: Prompts, num_tokens: int) -> tuple[float, float]:
            work = {"prompts": rows, "scales": scales, "num_tokens": num_tokens}
            start = time.perf_counter()
            assert self.process.stdin
            self.process.stdin.write(json.dumps(work) + "\n")
            self.process.stdin.flush()
            cpu = float(self._read()["cpu_s"])
            return time.perf_counter() - start, cpu

        return run

    def close(self) -> None:
        self.process.communicate()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith("{"):
                return dict(json.loads(line))
        raise RuntimeError("llama.cpp's process ended; its reason is above.")


def two_each(count: int, adapters: int = BATCH) -> list[Mix]:
    """Distinct mixes of two adapters each."""
    return [
        Mix({f"a{n % adapters}": 0.45, f"a{(n + 1 + n // adapters) % adapters}": 0.55})
        for n in range(count)
    ]


def byte_limit(base_bytes: int, adapters: Sequence[Adapter], ours: LocalEngine) -> float:
    """(base + KV) / (base + KV + adapters in the batch): what reading memory alone allows."""
    kv = BATCH * (SHORT + STEPS // 2) * ours.token_bytes
    extra = sum(size_bytes(adapter.pairs.values()) for adapter in adapters)
    return (base_bytes + kv) / (base_bytes + kv + extra)


def memory(tiles: bool | None) -> dict[str, float]:
    """Bytes of an engine that serves 32 requests under mixes of 8 adapters, and their parts."""
    model = material.random_model()
    base_bytes = material.size_bytes(model)
    adapters = [material.random_adapter(model, f"a{n}", seed=n) for n in range(BATCH)]
    sizes = sum(size_bytes(adapter.pairs.values()) for adapter in adapters)
    base = material.base_of(model)
    with LocalEngine(base, adapters, kv_bytes=KV_BYTES, tiles=tiles) as engine:
        del adapters
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        Ours(engine).under(two_each(32))(prompts(32, SHORT), STEPS)
        status = dict(
            line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines()
        )
    peak = int(status["VmHWM"].split()[0]) * 1024
    return {"peak": peak, "base": base_bytes, "kv": KV_BYTES, "adapters": sizes}


def measure(
    table: Table, rounds: int, folder: Path, native: Path | None, tiles: bool | None
) -> float:
    """Fill the table; returns the byte limit of decoding under mixes."""
    model = material.random_model()
    base_bytes = material.size_bytes(model)
    adapters = [material.random_adapter(model, f"a{n}", seed=n) for n in range(64)]
    for adapter in adapters[:BATCH]:
        peft.write(adapter, folder / adapter.name)
        material.write_gguf_adapter(adapter, folder / f"{adapter.name}.gguf")
    plain, eight_bits = folder / "bf16.gguf", folder / "q8_0.gguf"
    material.write_gguf(model, plain, GGMLQuantizationType.BF16)
    material.write_gguf(model, eight_bits, GGMLQuantizationType.Q8_0)
    files = [folder / f"a{n}.gguf" for n in range(BATCH)]
    library = Told(folder / "library")
    new = [adapter.name for adapter in adapters[BATCH : BATCH + 20]]
    for adapter in adapters[BATCH : BATCH + 20]:
        library.put(adapter)

    peer_models = [material.same_weights(model) for _ in range(3)]  # before ours wraps its layers
    engine = LocalEngine(
        material.base_of(model), adapters[:BATCH], library, reuse=False, max_batch=32, tiles=tiles
    )
    print(f"ours: products of few rows by {'the C function' if engine.has_tiles else 'torch'}")
    ours, bare = Ours(engine), [Mix()] * 32
    short, one, burst = prompts(BATCH, SHORT), prompts(1, SHORT), prompts(BATCH, LONG, 1)
    ways: dict[str, tuple[Answers, Prompts]] = {
        "ours, 8 mixes": (timed(ours.under(two_each(BATCH))), short),
        "ours, bare base": (timed(ours.under(bare[:BATCH])), short),
        "ours, 1 mix": (timed(ours.under(two_each(1))), one),
        "ours, bare, 1": (timed(ours.under(bare[:1])), one),
    }
    peers: dict[str, Callable[[], dict[str, tuple[Answers, Prompts]]]] = {
        "PEFT": lambda: {
            "PEFT, one adapter each": (timed(pefts(peer_models[0], folder)), short),
        },
        "transformers": lambda: {
            "transformers, static batch": (timed(static_batch(peer_models[1])), short),
            "transformers, continuous": (timed(continuous_batch(peer_models[2])), short),
        },
        "llama.cpp bf16": lambda: llama_ways("bf16", Llama(plain, files), short, one),
        "llama.cpp Q8_0": lambda: llama_ways("Q8_0", Llama(eight_bits, files), short, one),
    }
    if native:
        peers[f"llama.cpp {NATIVE}"] = lambda: llama_ways(
            NATIVE, Llama(plain, files, native), short, one
        )
    for peer, ready in peers.items():
        try:
            ways |= ready()
        except Exception as error:
            print(f"{peer} did not run: {error!r}", flush=True)

    for number in range(rounds):
        print(f"round {number + 1} of {rounds}")
        for _ in range(REPEATS):
            for name, (answer, rows) in ways.items():
                rate, cpu = decode_rate(answer, rows)
                table.add(name, rate)
                table.add(f"{name}: CPU ms a token", 1000 * cpu)
        for name in ("ours, 1 mix", "llama.cpp bf16, 1 mix"):
            if name in ways:
                wall, _ = ways[name][0](burst[:1], 1)
                table.add(f"{name}: first token of 512, s", wall)
        for name, mixes in (("prefill, 8 mixes", two_each(BATCH)), ("prefill, bare", bare[:BATCH])):
            wall, _ = timed(ours.under(mixes))(burst, 1)
            table.add(name, BATCH * LONG / wall)
        for count in COUNTS * 2:
            rate, _ = decode_rate(timed(ours.under(two_each(count))), prompts(count, SHORT, 2))
            table.add(f"ours, {count} at once", rate)
        for _ in range(REPEATS):
            table.add("ours, 8 mixes, 8 resident", decode_rate(*ways["ours, 8 mixes"])[0])
            for adapter in adapters[BATCH:]:
                engine.add(adapter)
            table.add("ours, 8 mixes, 64 resident", decode_rate(*ways["ours, 8 mixes"])[0])
            for adapter in adapters[BATCH:]:
                engine.remove(adapter.name)
        for name, asked in (("hot add", new), ("no add", [f"a{n % BATCH}" for n in range(20)])) * 2:
            decode = partial(ours.under(two_each(BATCH)), prompts(BATCH, SHORT, 5))
            found = stalls(engine, library, decode, asked)
            table.add(f"{name}, steps until its token", found.most_steps)
            table.add(f"{name}, slowest step / median", found.slowest)
            table.add(f"{name}, slowest step at each / median", found.typical)
            for fresh in new if asked == new else ():
                engine.remove(fresh)
    limit = byte_limit(base_bytes, adapters[:BATCH], engine)
    engine.close()
    return limit


def llama_ways(
    name: str, llama: Llama, short: Prompts, one: Prompts
) -> dict[str, tuple[Answers, Prompts]]:
    print(f"llama.cpp {name}: {llama.system}")
    return {
        f"llama.cpp {name}, 8 mixes": (llama.under(two_each(BATCH)), short),
        f"llama.cpp {name}, 1 mix": (llama.under(two_each(1)), one),
    }


def memory_apart(tiles: bool | None) -> dict[str, float]:
    """`memory()` in a process that does nothing else."""
    command = [sys.executable, str(Path(__file__).resolve()), "--memory"]
    command += ["--no-tiles"] if tiles is False else []
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(found.stdout.splitlines()[-1]))


def rows(table: Table, limit: float, memory: dict[str, float]) -> list[dict[str, object]]:
    found: list[dict[str, object]] = []

    def row(
        work: str,
        figure: float | None,
        peer: str,
        target: float | None,
        better: str = "higher",
        unit: str = "x",
    ) -> None:
        rounded = None if figure is None else round(figure, 3)
        found.append(
            {
                "work": work,
                "figure": rounded,
                "unit": unit,
                "peer": peer,
                "target": target,
                "better": better,
            }
        )

    eight, one = "ours, 8 mixes", "ours, 1 mix"
    against = table.ratio(eight, "ours, bare base")
    rates = [table.median(f"ours, {count} at once") or 0.0 for count in COUNTS]
    growth = min(after / before for before, after in pairwise(rates))
    allowed = memory["base"] + memory["kv"] + memory["adapters"]
    row("decode 8 mixes", against, "our bare base", None)
    row(f"decode 8 mixes, of the byte limit {limit:.3f}", against and against / limit, "it", 0.93)
    for peer, target in (("PEFT, one adapter each", 2.5), ("llama.cpp bf16, 8 mixes", 2.5)):
        row("decode 8 mixes", table.ratio(eight, peer), peer, target)
    row("decode 8 mixes", table.ratio(eight, "llama.cpp Q8_0, 8 mixes"), "llama.cpp Q8_0", None)
    native = f"llama.cpp {NATIVE}"
    row("decode 8 mixes", table.ratio(eight, f"{native}, 8 mixes"), native, None)
    row("decode 1 mix", table.ratio(one, "ours, bare, 1"), "our bare base", 0.85)
    row("decode 1 mix", table.ratio(one, "llama.cpp bf16, 1 mix"), "llama.cpp bf16", 0.9)
    row("decode 1 mix", table.ratio(one, f"{native}, 1 mix"), native, None)
    row("prefill 8 x 512", table.ratio("prefill, 8 mixes", "prefill, bare"), "our bare base", 0.85)
    for peer, target in (("transformers, static batch", 1.0), ("transformers, continuous", 1.3)):
        row("decode 8 bare", table.ratio("ours, bare base", peer), peer, target)
    row(
        "decode 8 mixes, 64 adapters resident",
        table.ratio("ours, 8 mixes, 64 resident", "ours, 8 mixes, 8 resident"),
        "8 resident",
        0.95,
    )
    row("tokens/s at twice the requests, least of 1 to 32", growth, "half as many", 1.0)
    row(
        "peak memory less base, KV budget and adapters",
        (memory["peak"] - allowed) / 1e6,
        "its parts",
        600,
        "lower",
        "MB",
    )
    row(
        "hot add, steps from file to first token, worst of 20",
        table.median("hot add, steps until its token"),
        "none",
        2,
        "lower",
        "steps",
    )
    slowest = ", slowest step / median"
    row("hot add, slowest step", table.median("hot add" + slowest), "median step", 1.15, "lower")
    row("no add, slowest step", table.median("no add" + slowest), "median step", None, "lower")
    each = ", slowest step at each / median"
    for name in ("hot add", "no add"):
        work = f"{name}, slowest step at each, median of 20"
        row(work, table.median(name + each), "median step", None, "lower")
    first = ": first token of 512, s"
    ratio = table.ratio(one + first, "llama.cpp bf16, 1 mix" + first)
    row("time to first token, 512 under 1 mix", ratio, "llama.cpp bf16", None, "lower")
    cpu = ": CPU ms a token"
    for peer in ("PEFT, one adapter each", "llama.cpp bf16, 8 mixes"):
        ratio = table.ratio(eight + cpu, peer + cpu)
        row("CPU time a token, 8 mixes", ratio, peer, None, "lower")
    return found


def plot(table: Table, path: Path) -> None:
    """Tokens per second, ours and theirs, as bars."""
    from matplotlib import pyplot

    apart = (":", "add", "prefill")
    names = [name for name in table.figures if not any(part in name for part in apart)]
    figure, axes = pyplot.subplots(figsize=(8, 0.3 * len(names) + 1))
    colours = ["tab:blue" if name.startswith("ours") else "tab:gray" for name in names]
    bars = axes.barh(names, [table.median(name) or 0.0 for name in names], color=colours)
    axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("tokens per second, all requests together (random Qwen3-0.6B shape, bfloat16)")
    figure.tight_layout()
    figure.savefig(path, bbox_inches="tight")  # the label is wider than the bars


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round instead of five")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--plot", type=Path, help="draw the rates here (SVG or PNG)")
    parser.add_argument("--native", type=Path, help="a llama-server that native_llama.sh built")
    parser.add_argument(
        "--no-tiles",
        dest="tiles",
        action="store_false",
        default=None,
        help="our engine without its C function",
    )
    parser.add_argument("--memory", action="store_true", help="only the memory figure's parts")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    if options.memory:
        print(json.dumps(memory(options.tiles)))
        sys.exit()
    apart = memory_apart(options.tiles)
    table = Table()
    with tempfile.TemporaryDirectory() as place:
        rounds = 1 if options.quick else 5
        limit = measure(table, rounds, Path(place), options.native, options.tiles)
    found = rows(table, limit, apart)
    for entry in found:
        target = "" if entry["target"] is None else f"(target {entry['target']})"
        figure = f"{entry['figure']} {entry['unit']}"
        print(f"{entry['work']:50} {figure:>14}  {entry['peer']} {target}")
    if options.json:
        options.json.write_text(json.dumps({"rows": found}, indent=2) + "\n", "utf-8")
    if options.plot:
        plot(table, options.plot)
