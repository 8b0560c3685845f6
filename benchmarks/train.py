"""Training four experts: one after another with PEFT and TRL, with loramix, and in one pass.

    pip install -r benchmarks/requirements.txt
    python benchmarks/train.py [--quick] [--size pocket|large] [--kept FILE] [--json FILE]

Everybody gets the same weights, rows, number of steps, LoRA (rank 16 on all linear layers but the
output), AdamW and precision (float32), two threads. Each way runs in a process of its own, in
turns; its time counts from opening the base to the last expert, imports apart, and its memory is
the process's peak beyond what its imports take. Tokens are those of the rows, padding not counted.
`large` is a base of Qwen2.5-0.5B's shape with random weights, and fewer steps. A peer that fails or
is not installed has no figure. Results go to FILE as they come, if given: a comparison that was cut
short goes on from there.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from statistics import median
from typing import Any

THREADS = os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
EXPERTS, RANK, RATE = 4, 16, 1e-3
OF_WEIGHT = 16  # bytes an expert takes for each: itself, its gradient, and two of Adam's
WAYS = {
    "peft": "PEFT + transformers Trainer, one after another",
    "trl": "TRL's SFTTrainer, one after another",
    "ours": "loramix, one after another",
    "pass": "loramix, one pass",
    "single": "loramix, one expert of the four",
}
PEERS = ("peft", "trl")
# rows of an expert, rows of a step
SIZES = {"pocket": (96, 8), "large": (8, 4)}


def rows_of(expert: int, count: int, vocabulary: int) -> list[tuple[list[int], int]]:
    """Tokens of each row, and where its answer begins: short questions, shorter answers."""
    rng = random.Random(expert)
    rows = []
    for _ in range(count):
        prompt, answer = rng.randint(12, 60), rng.randint(3, 24)
        rows.append(([rng.randrange(5, vocabulary) for _ in range(prompt + answer)], prompt))
    return rows


def folder_of(size: str, work: Path) -> Path:
    """The base's folder; the large one is made of random weights, once."""
    if size == "pocket":
        from loramix.folders import POCKET_BASE

        return POCKET_BASE
    folder = work / "large"
    if not folder.exists():
        import torch
        from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

        torch.manual_seed(0)
        config = Qwen2Config(
            vocab_size=151_936,
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
        Qwen2ForCausalLM(config).save_pretrained(folder)
        from loramix.folders import POCKET_BASE

        AutoTokenizer.from_pretrained(POCKET_BASE).save_pretrained(folder)
    return folder


def ours(folder: Path, experts: list[list[Any]], batch: int, together: bool) -> float:
    """Seconds; a micro-batch has the rows of one step, with one expert and with several."""
    from loramix.adapter import Card
    from loramix.base import open_base
    from loramix.train.config import Run, Settings
    from loramix.train.data import Row
    from loramix.train.learner import Course
    from loramix.train.loop import train

    settings = Settings(
        rank=RANK, rate=RATE, epochs=1, batch_size=batch, schedule="linear", warmup=0
    )
    start = time.perf_counter()
    courses = [
        Course(Card(f"e{n}"), [Row(tuple(i), ((a, len(i)),)) for i, a in rows], (), settings)
        for n, rows in enumerate(experts)
    ]
    groups = [courses] if together else [[course] for course in courses]
    for group in groups:
        base = open_base(str(folder), device="cpu", dtype="float32")
        train(base, group, Run(micro_rows=batch))
    return time.perf_counter() - start


def peers(folder: Path, experts: list[list[Any]], batch: int, way: str, work: Path) -> float:
    import datasets
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        Trainer,
        TrainingArguments,
    )

    datasets.disable_progress_bars()
    options: dict[str, Any] = {
        "output_dir": str(work / "peer"),
        "per_device_train_batch_size": batch,
        "num_train_epochs": 1,
        "learning_rate": RATE,
        "lr_scheduler_type": "linear",
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "seed": 0,
    }
    config = LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    start = time.perf_counter()
    for rows in experts:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        learned = [
            {"input_ids": ids, "labels": [-100] * at + ids[at:], "attention_mask": [1] * len(ids)}
            for ids, at in rows
        ]
        if way == "trl":
            from trl import SFTConfig, SFTTrainer

            arguments = SFTConfig(**options, max_length=None)
            given = datasets.Dataset.from_list(learned)
            trainer = SFTTrainer(
                model,
                arguments,
                train_dataset=given,
                processing_class=tokenizer,
                peft_config=config,
            )
        else:
            trainer = Trainer(
                get_peft_model(model, config),
                TrainingArguments(**options),
                train_dataset=datasets.Dataset.from_list(learned),
                data_collator=DataCollatorForSeq2Seq(tokenizer),
            )
        trainer.train()
    return time.perf_counter() - start


def one(way: str, size: str, work: Path) -> None:
    """Run one way in this process and print its figures."""
    warnings.simplefilter("ignore")
    import torch
    from transformers import AutoConfig

    torch.set_num_threads(int(THREADS))
    folder = folder_of(size, work)
    if way == "base":
        return
    count, batch = SIZES[size]
    vocabulary = min(AutoConfig.from_pretrained(folder).vocab_size, 6000)
    experts = [rows_of(n, count, vocabulary) for n in range(1 if way == "single" else EXPERTS)]
    if way in ("ours", "pass", "single"):
        import loramix.train.loop  # noqa: F401

        bare = peak_mib()
        seconds = ours(folder, experts, batch, way == "pass")
    else:
        import peft  # noqa: F401

        if way == "trl":
            from trl import SFTTrainer  # noqa: F401
        bare = peak_mib()
        seconds = peers(folder, experts, batch, way, work)
    tokens = sum(len(ids) for rows in experts for ids, _ in rows)
    print(json.dumps({"seconds": seconds, "tokens": tokens, "mib": peak_mib() - bare}))


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def expert_mib(folder: Path) -> float:
    """What an expert takes for itself while it learns."""
    from transformers import AutoConfig

    c = AutoConfig.from_pretrained(folder)
    head = c.hidden_size // c.num_attention_heads
    q, kv = c.num_attention_heads * head, c.num_key_value_heads * head
    shapes = [(q, c.hidden_size), (kv, c.hidden_size), (kv, c.hidden_size), (c.hidden_size, q)]
    shapes += 3 * [(c.hidden_size, c.intermediate_size)]
    weights = c.num_hidden_layers * RANK * sum(map(sum, shapes))
    return OF_WEIGHT * weights / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round instead of three")
    parser.add_argument("--size", choices=SIZES, help="one of the bases alone")
    parser.add_argument("--kept", type=Path, metavar="FILE", help="results so far")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=3, metavar=("WAY", "SIZE", "WORK"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        one(given.one[0], given.one[1], Path(given.one[2]))
        return
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as work:
        kept = given.kept or Path(work) / "kept.jsonl"
        for size in [given.size] if given.size else SIZES:
            run("base", size, Path(work))  # in its own process: ours would leave them its peak
            folder = folder_of(size, Path(work))
            found = results(size, Path(work), 1 if given.quick else 3, kept)
            rows += compared(size, found, expert_mib(folder))
    if given.json:
        given.json.write_text(json.dumps({"rows": rows}, indent=1), encoding="utf-8")


def run(way: str, size: str, work: Path) -> str:
    """What one way prints, in a process of its own."""
    words = [sys.executable, "-W", "ignore", __file__, "--one", way, size, str(work)]
    return subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout


def results(size: str, work: Path, rounds: int, kept: Path) -> dict[str, list[dict[str, float]]]:
    """Of every way, in turns; those that `kept` has are not run again, others are added to it.

    A peer that failed has none; what it said of it is on stderr.
    """
    lines = kept.read_text(encoding="utf-8").splitlines() if kept.exists() else []
    known = {(o["size"], o["way"], o["round"]): o["result"] for o in map(json.loads, lines)}
    failed = set()
    for number in range(rounds):
        for way in WAYS:
            if (size, way, number) in known or way in failed:
                continue
            try:
                printed = run(way, size, work)
            except subprocess.CalledProcessError:
                if way not in PEERS:
                    raise
                failed.add(way)
                continue
            result = known[size, way, number] = json.loads(printed.splitlines()[-1])
            with kept.open("a", encoding="utf-8") as file:
                line = {"size": size, "way": way, "round": number, "result": result}
                file.write(json.dumps(line) + "\n")
    return {
        way: [known[size, way, number] for number in range(rounds)]
        for way in WAYS
        if way not in failed
    }


def compared(
    size: str, found: dict[str, list[dict[str, float]]], of_expert: float
) -> list[dict[str, Any]]:
    """The table of one base, and its rows against the targets."""
    middle = {
        way: {key: median(result[key] for result in ours) for key in ours[0]}
        for way, ours in found.items()
    }
    print(f"\n{size}: {EXPERTS} experts, {SIZES[size][0]} rows each, {SIZES[size][1]} a step")
    print(f"{'':48} {'seconds':>8} {'tokens/s':>9} {'x peft':>7} {'MiB':>9}")
    for way, title in WAYS.items():
        if way not in middle:
            print(f"{title:48} {'failed':>8}")
            continue
        seconds, mib = middle[way]["seconds"], middle[way]["mib"]
        speed = middle[way]["tokens"] / seconds
        compare = way != "single" and "peft" in middle
        times = f"{middle['peft']['seconds'] / seconds:.2f}" if compare else ""
        print(f"{title:48} {seconds:8.1f} {speed:9.0f} {times:>7} {mib:9.0f}")
    rest = middle["pass"]["mib"] - EXPERTS * of_expert
    memory = {
        "work": f"train on {size}, memory of one pass beyond its experts' own",
        "figure": round(rest / (middle["single"]["mib"] - of_expert), 3),
        "unit": "x",
        "peer": WAYS["single"],
        "target": 1.15,
        "better": "lower",
    }
    print(f"memory of one pass beyond its experts' own: {memory['figure']} x one run's")
    return [
        memory,
        _row(size, "one after another against PEFT", "peft", "ours", middle, 1.0),
        _row(size, "one after another against TRL", "trl", "ours", middle, 1.0),
        _row(
            size, "one pass against PEFT", "peft", "pass", middle, 1.5 if size == "pocket" else 1.1
        ),
    ]


def _row(
    size: str, work: str, peer: str, way: str, middle: dict[str, dict[str, float]], target: float
) -> dict[str, Any]:
    return {
        "work": f"train on {size}, {work}",
        "figure": round(middle[peer]["seconds"] / middle[way]["seconds"], 3)
        if peer in middle
        else None,
        "unit": "x",
        "peer": WAYS[peer],
        "target": target,
        "better": "higher",
    }


if __name__ == "__main__":
    main()
