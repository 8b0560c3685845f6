"""Training four experts: one after another with PEFT and TRL, with loramix, and in one pass.

    pip install -r benchmarks/requirements.txt
    python benchmarks/train.py [--quick] [--large] [--json FILE]

Everybody gets the same weights, rows, number of steps, LoRA (rank 16 on all linear layers but the
output), AdamW and precision (float32), two threads. Each way runs in a process of its own, in
turns; its time counts from opening the base to the last expert, imports apart, and its memory is
the process's peak. Tokens are those of the rows, padding not counted. `--large` adds a base of
Qwen2.5-0.5B's widths with 4 of its 24 layers, and fewer steps.
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
WAYS = {
    "peft": "PEFT + transformers Trainer, one after another",
    "trl": "TRL's SFTTrainer, one after another",
    "ours": "loramix, one after another",
    "pass": "loramix, one pass",
}
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
        from loramix.base import POCKET

        return POCKET / "base"
    folder = work / "large"
    if not folder.exists():
        import torch
        from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

        torch.manual_seed(0)
        config = Qwen2Config(
            vocab_size=151_936,
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=4,
            num_attention_heads=14,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
        Qwen2ForCausalLM(config).save_pretrained(folder)
        from loramix.base import POCKET

        AutoTokenizer.from_pretrained(POCKET / "base").save_pretrained(folder)
    return folder


def ours(folder: Path, experts: list[list[Any]], batch: int, together: bool) -> float:
    from loramix.adapter import Card
    from loramix.base import open_base
    from loramix.train.config import Settings
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
        train(open_base(str(folder), device="cpu", dtype="float32"), group)
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
    count, batch = SIZES[size]
    vocabulary = min(AutoConfig.from_pretrained(folder).vocab_size, 6000)
    experts = [rows_of(n, count, vocabulary) for n in range(EXPERTS)]
    if way in ("ours", "pass"):
        import loramix.train.loop  # noqa: F401

        seconds = ours(folder, experts, batch, way == "pass")
    else:
        import peft  # noqa: F401

        if way == "trl":
            from trl import SFTTrainer  # noqa: F401
        seconds = peers(folder, experts, batch, way, work)
    tokens = sum(len(ids) for rows in experts for ids, _ in rows)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": seconds, "tokens": tokens, "mib": peak}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round instead of three")
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=3, metavar=("WAY", "SIZE", "WORK"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        one(given.one[0], given.one[1], Path(given.one[2]))
        return
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as work:
        for size in ("pocket", "large") if given.large else ("pocket",):
            if size == "large":
                folder_of(size, Path(work))
            rows += compare(size, work, rounds=1 if given.quick else 3)
    if given.json:
        given.json.write_text(json.dumps({"rows": rows}, indent=1), encoding="utf-8")


def compare(size: str, work: str, rounds: int) -> list[dict[str, Any]]:
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way, results in found.items():
            words = [sys.executable, "-W", "ignore", __file__, "--one", way, size, work]
            done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
            results.append(json.loads(done.stdout.splitlines()[-1]))
    middle = {
        way: {key: median(result[key] for result in results) for key in results[0]}
        for way, results in found.items()
    }
    slowest = middle["peft"]["seconds"]
    print(f"\n{size}: {EXPERTS} experts, {SIZES[size][0]} rows each, {SIZES[size][1]} a step")
    print(f"{'':48} {'seconds':>8} {'tokens/s':>9} {'x peft':>7} {'peak MiB':>9}")
    for way, title in WAYS.items():
        seconds, mib = middle[way]["seconds"], middle[way]["mib"]
        speed = middle[way]["tokens"] / seconds
        print(f"{title:48} {seconds:8.1f} {speed:9.0f} {slowest / seconds:7.2f} {mib:9.0f}")
    return [
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
        "figure": round(middle[peer]["seconds"] / middle[way]["seconds"], 3),
        "unit": "x",
        "peer": WAYS[peer],
        "target": target,
        "better": "more",
    }


if __name__ == "__main__":
    main()
