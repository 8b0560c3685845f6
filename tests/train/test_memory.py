"""What is told of memory before a run begins."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from loramix.adapter import Card
from loramix.folders import POCKET_BASE
from loramix.mixed import MixedModel
from loramix.train.config import Run, Settings
from loramix.train.forward import judged_batches
from loramix.train.learner import Course, Learner
from loramix.train.memory import Estimate, estimate, num_trained
from tests.tiny import tiny_base
from tests.train.small import rows_of

linux = pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")


@pytest.mark.parametrize("more", [{}, {"dora": True}, {"targets": ("q_proj",)}])
def test_parameters_are_counted_as_they_are_learned(more):
    base = tiny_base()
    settings = Settings(rank=3, **more)
    learner = Learner(Course(Card("x"), rows_of(base), (), settings), MixedModel(base.model))
    learned = sum(weight.numel() for weight in learner.weights.values())
    learner.mixed.release()
    assert num_trained(base, settings) == learned


def test_an_estimate_grows_with_what_costs_memory():
    base = tiny_base()
    rows, run, settings = rows_of(base), Run(micro_tokens=4096), Settings(rank=3, keep_best=False)
    least = estimate(base, [settings], run, [rows])
    parameters = sum(p.nbytes for p in base.model.parameters())
    assert parameters <= least.base < 1.01 * parameters
    assert least.experts == 16 * num_trained(base, settings)
    assert estimate(base, [settings] * 2, run, [rows] * 2).experts == 2 * least.experts
    best = dataclasses.replace(settings, keep_best=True)
    assert estimate(base, [best], run, [rows]).experts == 20 * num_trained(base, settings)
    many = estimate(base, [settings], run, [rows * 4])
    assert many.activations > 3 * least.activations
    spared = estimate(base, [settings], dataclasses.replace(run, checkpointing=True), [rows * 4])
    assert spared.activations < many.activations
    assert "MiB (base" in str(least)


def test_estimating_leaves_the_base_as_it_was():
    base = tiny_base()
    before = dict(base.model.named_modules())
    weights = {name: weight.clone() for name, weight in base.model.named_parameters()}
    estimate(base, [Settings(rank=3, dora=True, start="default")], Run(), [rows_of(base)])
    assert dict(base.model.named_modules()) == before
    assert all(torch.equal(weights[n], w) for n, w in base.model.named_parameters())
    assert not any(w.requires_grad for w in base.model.parameters())


def test_what_does_not_fit_is_said_with_the_levers():
    needed = Estimate(base=1 << 30, experts=1 << 20, activations=3 << 20)
    assert needed.warning(None) == ""
    assert needed.warning(4 << 20) == ""
    assert needed.warning((4 << 20) - 1).startswith("4 MiB more are needed and 4 are free: pull")


def test_batches_that_are_only_measured_keep_a_large_vocabulary_small():
    base = tiny_base()
    rows = rows_of(base) * 400
    few = judged_batches(base.model, rows)
    base.model.config.vocab_size = 1 << 20
    many = judged_batches(base.model, rows)
    assert max(batch.ids.numel() for batch in few) > 4 * 128
    assert max(batch.ids.numel() for batch in many) <= 128
    for batches in (few, many):
        assert sum(len(batch.rows) for batch in batches) == len(rows)


@pytest.fixture(scope="module")
def half_billion(tmp_path_factory):
    """The folder of a base of Qwen2.5-0.5B's shape."""
    folder = tmp_path_factory.mktemp("half-billion")
    shape = Qwen2Config(
        vocab_size=151_936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    Qwen2ForCausalLM(shape).save_pretrained(folder)
    AutoTokenizer.from_pretrained(POCKET_BASE).save_pretrained(folder)
    return folder


@pytest.mark.slow
@linux
@pytest.mark.parametrize(("experts", "checkpointing"), [(1, False), (1, True), (4, False)])
def test_the_peak_is_about_what_was_told(experts, checkpointing):
    told, measured = told_and_measured("pocket", experts, checkpointing)
    assert 0.85 < told / measured < 1.15


@pytest.mark.slow
@linux
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_peak_of_half_a_billion_is_about_what_was_told(half_billion, checkpointing):
    told, measured = told_and_measured(str(half_billion), 1, checkpointing)
    assert 0.85 < told / measured < 1.15


def told_and_measured(base: str, experts: int, checkpointing: bool) -> tuple[float, float]:
    """In a process of its own: bytes that training adds to the opened base.

    Blocks that glibc keeps after they were freed are not told: here it gives them back.
    """
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, base, str(experts), str(int(checkpointing))],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        check=True,
    )
    told, measured = map(float, done.stdout.split()[-2:])
    return told, measured


MEASURED = """
import random, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from loramix.adapter import Card
from loramix.base import open_base
from loramix.train.config import Run, Settings
from loramix.train.data import Row
from loramix.train.learner import Course
from loramix.train.loop import train
from loramix.train.memory import estimate

def of_status(name):
    return int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0]) * 1024

base, drawn = open_base(sys.argv[1], dtype="float32"), random.Random(0)
experts, run = int(sys.argv[2]), Run(micro_rows=8, checkpointing=sys.argv[3] == "1")
settings = Settings(batch_size=8, max_steps=2)
rows = [
    [Row(tuple(drawn.choices(range(5, 6000), k=256)), ((85, 256),)) for _ in range(16)]
    for _ in range(experts)
]
told = estimate(base, [settings] * experts, run, rows, [own[:4] for own in rows])
before = of_status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
courses = [Course(Card(f"e{n}"), own, own[:4], settings) for n, own in enumerate(rows)]
train(base, courses, run)
print(told.experts + told.activations, of_status("VmHWM") - before)
"""
