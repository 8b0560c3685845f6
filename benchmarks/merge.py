"""Merging beside its peers: cp, PEFT, mergekit.

    pip install -r benchmarks/requirements.txt
    python benchmarks/merge.py [--layers 8] [--quick] [--only ...] [--mergekit PYTHON] [--json FILE]

A base of Llama-2-7B's layer shapes in bfloat16 with random weights (8 layers and the embeddings are
3.7 GB, the smallest; 32 are 13.5 GB), and two adapters of rank 16 on its seven linear layers. Each
command runs in a process of its own, in turns, the base's files evicted from the page cache before;
medians of the rounds. Memory is the largest RssAnon of the process, less that of one that has
imported torch and nothing else. mergekit needs an environment of its own, whose python is given.

A merge ends when its bytes are on the disk; "cp" leaves them to the kernel, "cp+sync" waits.
"untouched" merges an adapter of a single matrix, so that all the rest is copied; "larger" is ours
into a base of three times as many layers; "search" runs search.py, which needs LORAMIX_DATA. On the
disk there have to be four times the size of the base, eight times for "larger".
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TypeAlias

HERE = Path(__file__).parent
HIDDEN, INNER, VOCAB = 4096, 11008, 32000
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
RANK = 16
SHARD = 1 << 30  # bytes
LARGER = 3  # times as many layers
WEIGHTS = (0.6, 0.4)
MIX = "one:0.6+two:0.4"

PEFT = """
import sys
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, one, two, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype="bfloat16")
model = PeftModel.from_pretrained(model, one, adapter_name="one")
model.load_adapter(two, adapter_name="two")
model.merge_and_unload(adapter_names=["one", "two"]).save_pretrained(out)
"""
PEFT_SVD = """
import time, torch
from peft import LoraConfig, get_peft_model
config = LoraConfig(r=16, target_modules=["0"], init_lora_weights=False)
model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4096, 4096, bias=False)), config, "one")
model.add_adapter("two", config)
start = time.perf_counter()
model.add_weighted_adapter(["one", "two"], [0.6, 0.4], "both", "svd", svd_rank=16)
print(time.perf_counter() - start)
"""
COLUMNS = ("work", "figure", "unit", "peer", "target", "better")
PARTS = (
    "cp",
    "cp+sync",
    "ours",
    "untouched",
    "PEFT",
    "mergekit",
    "larger",
    "recompression",
    "search",
)
RECOMPRESSED = "recompression of a 7B pair"
Figure: TypeAlias = dict[str, object]


@dataclass
class Run:
    """What one command took, in each round."""

    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    anon: list[float] = field(default_factory=list)  # GiB


def make_base(folder: Path, layers: int) -> int:
    """Write the base in shards; the size in bytes. Every layer has the same random numbers."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    folder.mkdir(parents=True)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=layers,
        num_attention_heads=32,
        vocab_size=VOCAB,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    pool = {
        shape: (torch.randn(*shape, generator=generator) * 0.02).bfloat16()
        for shape in {*SHAPES.values(), (VOCAB, HIDDEN)}
    }
    ones = torch.ones(HIDDEN, dtype=torch.bfloat16)
    names = {"model.embed_tokens.weight": pool[VOCAB, HIDDEN], "model.norm.weight": ones}
    names["lm_head.weight"] = pool[VOCAB, HIDDEN]
    for layer in range(layers):
        at = f"model.layers.{layer}"
        names |= {f"{at}.{part}.weight": pool[shape] for part, shape in SHAPES.items()}
        names |= {
            f"{at}.{norm}.weight": ones for norm in ("input_layernorm", "post_attention_layernorm")
        }
    groups: list[dict[str, torch.Tensor]] = [{}]
    for name, tensor in names.items():
        if sum(each.nbytes for each in groups[-1].values()) + tensor.nbytes > SHARD and groups[-1]:
            groups.append({})
        groups[-1][name] = tensor
    index = {}
    for n, group in enumerate(groups, 1):
        file = f"model-{n:05}-of-{len(groups):05}.safetensors"
        index |= dict.fromkeys(group, file)
        own = {name: tensor.clone() for name, tensor in group.items()}
        save_file(own, folder / file, metadata={"format": "pt"})
    size = sum(tensor.nbytes for tensor in names.values())
    told = {"metadata": {"total_size": size}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(told), "utf-8")
    return size


def make_adapter(
    folder: Path, layers: int, seed: int, shapes: Mapping[str, tuple[int, int]] = SHAPES
) -> None:
    """A bfloat16 adapter whose update is a hundredth of the base."""
    import torch

    from loramix.adapter import Adapter, Card
    from loramix.formats import peft
    from loramix.lora import Pair

    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    pairs = {}
    for layer in range(layers):
        for part, (out, width) in shapes.items():
            a, b = draw(RANK, width) * 0.01, draw(out, RANK) * 0.005
            pairs[f"model.layers.{layer}.{part}"] = Pair(a.bfloat16(), b.bfloat16())
    peft.write(Adapter(folder.name, pairs, "", Card(folder.name)), folder)


def evict(folder: Path) -> None:
    """Write what is dirty, then drop the folder's pages from the cache."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(name: str, command: Sequence[str], run: Run, out: Path | None = None) -> None:
    """One run of a command: wall, CPU and the largest anonymous memory, with its children.

    What it is to write at `out` is deleted before, and the files beside it leave the page cache.
    """
    if out:
        shutil.rmtree(out, ignore_errors=True)
        evict(out.parent)
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    start, before, peak = time.perf_counter(), os.times(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=offline)
    while process.poll() is None:
        peak = max(peak, anonymous(process.pid))
        time.sleep(0.01)
    after = os.times()
    if process.returncode:
        raise SystemExit(f"{name} ended with {process.returncode}")
    run.wall_s.append(time.perf_counter() - start)
    used = after.children_user + after.children_system
    run.cpu_s.append(used - before.children_user - before.children_system)
    run.anon.append(peak / 2**20)
    print(f"{name:10} {run.wall_s[-1]:7.1f} s wall {run.cpu_s[-1]:7.1f} s CPU "
          f"{run.anon[-1]:6.2f} GiB anonymous", flush=True)  # fmt: skip


def anonymous(pid: int) -> int:
    """RssAnon in KiB; 0 when the process has gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text("ascii")
    except OSError:
        return 0
    return next((int(x.split()[1]) for x in text.splitlines() if x.startswith("RssAnon")), 0)


def rounding(base: Path, out: Path, adapters: Sequence[Path]) -> dict[str, float]:
    """How much of the update of some rows is lost, beside a single perfect rounding."""
    import torch

    from loramix.formats import peft
    from loramix.merge.stored import open_stored

    before, after = open_stored(base).tensors, open_stored(out).tensors
    pairs = [peft.read(path).pairs for path in adapters]
    lost, best, whole, wrong, count = 0.0, 0.0, 0.0, 0, 0
    for layer in pairs[0]:
        old, new = (t[f"{layer}.weight"].rows(100, 164) for t in (before, after))
        delta = sum(
            weight * (each[layer].b[100:164].double() @ each[layer].a.double())
            for weight, each in zip(WEIGHTS, pairs, strict=True)
        )
        exact = old.double() + delta
        lost += float((new.double() - exact).square().sum())
        best += float((exact.to(torch.bfloat16).double() - exact).square().sum())
        whole += float(delta.square().sum())
        wrong += int((new != exact.to(torch.bfloat16)).sum())
        count += new.numel()
    return {
        "lost": (lost / whole) ** 0.5,
        "best": (best / whole) ** 0.5,
        "wrong": wrong / count,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS, help="only these")
    parser.add_argument("--mergekit", help="python of an environment that has mergekit")
    parser.add_argument("--folder", type=Path, help="work here, on the disk to measure")
    parser.add_argument("--json", type=Path, help="write the rows here")
    options = parser.parse_args()
    rows: list[Figure] = []
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        rows += compare(Path(scratch), options)
        if "larger" in options.only:
            rows.append(larger(Path(scratch), LARGER * options.layers))
        if "recompression" in options.only:
            rows += recompression(Path(scratch))
    if "search" in options.only:
        rows += search(options.quick)
    for row in rows:
        print("  ".join(f"{row[key]!s:>14}" for key in COLUMNS))
    if options.json:
        options.json.write_text(json.dumps({"rows": rows}, indent=2) + "\n", "utf-8")


def ours(library: Path, mix: str, base: Path, out: Path) -> list[str]:
    """Our command."""
    words = ["merge", "-m", mix, "--library", str(library), "--into", str(base), "-o", str(out)]
    return [sys.executable, "-c", "from loramix.cli import run; run()", *words]


def compare(work: Path, options: argparse.Namespace) -> list[Figure]:
    """Everything that writes a model, once a round, in turns."""
    base, out, library = work / "base", work / "out", work / "library"
    size = make_base(base, options.layers)
    for seed, name in enumerate(("one", "two"), 1):
        make_adapter(library / name, options.layers, seed)
    make_adapter(library / "single", 1, 3, {"self_attn.q_proj": (HIDDEN, HIDDEN)})
    both = (str(library / "one"), str(library / "two"))
    commands = {
        "cp": ["cp", "-r", str(base), str(out)],
        "cp+sync": ["sh", "-c", 'cp -r "$0" "$1" && sync', str(base), str(out)],
        "ours": ours(library, MIX, base, out),
        "untouched": ours(library, "single", base, out),
        "PEFT": [sys.executable, "-c", PEFT, str(base), *both, str(out)],
    }
    if options.mergekit:
        commands["mergekit"] = mergekit(options.mergekit, work, base, both, out)
    elif "mergekit" in options.only:
        print("mergekit is left out: its python is not given")
    runs = {name: Run() for name in commands if name in options.only}
    errors: dict[str, dict[str, float]] = {}
    for n in range(1 if options.quick else options.rounds):
        for name, run in runs.items():
            if name == "mergekit" and n:
                continue  # minutes long: once
            measure(name, commands[name], run, out)
            shutil.rmtree(work / "cache", ignore_errors=True)
            if name in ("ours", "mergekit") and name not in errors:
                errors[name] = rounding(base, out, [Path(each) for each in both])
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(base)
    return figures(runs, errors, size)


def larger(work: Path, layers: int) -> Figure:
    """Our memory, for a base with more layers."""
    base, library = work / "base", work / "large"
    size = make_base(base, layers)
    for seed, name in enumerate(("one", "two"), 1):
        make_adapter(library / name, layers, seed)
    run = Run()
    measure("larger", ours(library, MIX, base, work / "out"), run, work / "out")
    shutil.rmtree(work / "out")
    shutil.rmtree(base)
    return memory(run, size)


def search(quick: bool) -> list[Figure]:
    """The rows of search.py."""
    with tempfile.TemporaryDirectory() as scratch:
        found = Path(scratch) / "rows.json"
        flags = ["--quick"] if quick else []
        command = [sys.executable, str(HERE / "search.py"), *flags, "--json", str(found)]
        subprocess.run(command, check=True)
        rows: list[Figure] = json.loads(found.read_text("utf-8"))["rows"]
        return rows


def mergekit(python: str, work: Path, base: Path, adapters: Sequence[str], out: Path) -> list[str]:
    """Its own command, with the flags that save most memory."""
    models = [
        {"model": f"{base}+{adapter}", "parameters": {"weight": weight}}
        for adapter, weight in zip(adapters, WEIGHTS, strict=True)
    ]
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(base),
        "models": models,
        "dtype": "bfloat16",
        "parameters": {"normalize": False},
    }
    (work / "mergekit.yml").write_text(json.dumps(recipe), "utf-8")  # JSON is YAML
    flags = ["--lora-merge-cache", str(work / "cache"), "--lazy-unpickle", "--no-write-model-card"]
    flags += ["--out-shard-size", "1B", "--no-copy-tokenizer"]
    run = "from mergekit.scripts.run_yaml import main; main()"
    return [python, "-c", run, str(work / "mergekit.yml"), str(out), *flags]


def figure(
    work: str, found: float, unit: str, peer: str, target: float | None, better: str
) -> Figure:
    """A row of the table."""
    values = (work, round(found, 4), unit, peer, target, better)
    return dict(zip(COLUMNS, values, strict=True))


def memory(run: Run, size: int) -> Figure:
    """Of one of our merges, beside a process that has imported torch and nothing else."""
    bare = Run()
    measure("torch", [sys.executable, "-c", "import torch, time; time.sleep(0.3)"], bare)
    more = median(run.anon) - bare.anon[0]
    return figure(f"memory, {size / 1e9:.1f} GB base", more, "GiB", "a bare torch", 0.35, "lower")


def figures(
    runs: Mapping[str, Run], errors: Mapping[str, Mapping[str, float]], size: int
) -> list[Figure]:
    """What the runs say of ours."""
    if "ours" not in runs:
        return []
    work = f"merge, {size / 1e9:.1f} GB base, two adapters"
    wall = median(runs["ours"].wall_s)
    rows = [memory(runs["ours"], size)]
    for peer, most in (("cp", 1.3), ("cp+sync", None)):
        if peer not in runs:
            continue
        copied = median(runs[peer].wall_s)
        rows.append(figure(work, wall / copied, "x of its wall", peer, most, "lower"))
        if "untouched" in runs:
            alone = median(runs["untouched"].wall_s)
            single = "merge of one matrix, the rest is copied"
            rows.append(figure(single, alone / copied, "x of its wall", peer, None, "lower"))
    for peer, target in (("PEFT", 3), ("mergekit", 8)):
        if peer in runs:
            faster = median(runs[peer].wall_s) / wall
            rows.append(figure(work, faster, "x faster", peer, target, "higher"))
            anon = median(runs[peer].anon) / median(runs["ours"].anon)
            rows.append(figure("anonymous memory", anon, "x less", peer, 1, "higher"))
    lost = errors["ours"]["lost"] / errors["ours"]["best"]
    rows.append(figure("bf16 rounding error", lost, "x of one rounding", "float64", 1, "lower"))
    peer = f"mergekit {errors['mergekit']['wrong']:.1%}" if "mergekit" in errors else "float64"
    wrong = "entries wrongly rounded"
    rows.append(figure(wrong, errors["ours"]["wrong"], "share", peer, 0.001, "lower"))
    return rows


def recompression(work: Path) -> list[Figure]:
    """Two adapters of a 7B as one of rank 16: the whole of it, beside PEFT's svd of one matrix."""
    from loramix.formats import peft
    from loramix.merge.core import Size
    from loramix.merge.fold import merge_adapters
    from loramix.merge.recipe import Recipe
    from loramix.mix import Mix

    library = work / "7b"
    for seed, name in enumerate(("one", "two"), 1):
        make_adapter(library / name, 32, seed)
    rows: list[Figure] = []
    for size, name in ((Size(), "merge of a 7B pair, exact"), (Size(RANK), RECOMPRESSED)):
        walls = []
        for _ in range(3):
            shutil.rmtree(work / "both", ignore_errors=True)
            os.sync()
            start = time.perf_counter()
            adapters = {name: peft.read(library / name) for name in ("one", "two")}
            merge_adapters(adapters, Recipe(Mix.parse(MIX)), size).save(work / "both")
            walls.append(time.perf_counter() - start)
        rows.append(figure(name, median(walls), "s, files to files", "-", 2, "lower"))
    command = [sys.executable, "-W", "ignore", "-c", PEFT_SVD]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    theirs = 32 * len(SHAPES) * float(found.stdout.splitlines()[-1])  # more: MLPs are larger
    peer = f"PEFT svd, {theirs:.0f} s or more, from one matrix"
    rows.append(figure(RECOMPRESSED, theirs / median(walls), "x faster", peer, 1, "higher"))
    return rows


if __name__ == "__main__":
    main()
