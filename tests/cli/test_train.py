"""`loramix train` begun several times over by a launcher: one run, and one process that tells."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import loramix
from loramix.cli.train import train
from loramix.errors import BadRequest
from loramix.library import Library
from tests.tiny import tiny_base

LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--nproc-per-node", "2"],
    "accelerate": ["accelerate.commands.accelerate_cli", "launch", "--multi_gpu",
                   "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
                   "--dynamo_backend", "no"],
    "fsdp": ["accelerate.commands.accelerate_cli", "launch", "--use_fsdp", "--fsdp_version", "2",
             "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
             "--dynamo_backend", "no"],
}  # fmt: skip


def test_a_job_under_a_launcher_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BadRequest, match="would begin a job each"):
        train(["experts.yaml"], detach=True)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launchers_processes_train_one_run(launcher, tmp_path):
    base = tiny_base(max_position_embeddings=2048)
    base.model.save_pretrained(tmp_path / "base")
    base.tokenizer.save_pretrained(tmp_path / "base")
    rows = [{"prompt": f"say {n}", "completion": f"{n} is said"} for n in range(30)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def trained(name, *before):
        words = ["-m", "loramix", "train", "--data", "rows.jsonl", "--name", name, "--base", "base"]
        if before:
            words = ["-m", *before, *words]
        done = subprocess.run(
            [sys.executable, *words, "fit_router=false"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(Path(loramix.__file__).parents[1]),
                 "LORAMIX_LIBRARY": str(tmp_path / "own" / "library")},
            capture_output=True,
            text=True,
            timeout=200,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("expert alone") == 1, done.stdout
        return Library(tmp_path / "own" / "library").load(name)

    alone, together = trained("alone"), trained("together", *LAUNCHERS[launcher])
    for layer, pair in alone.pairs.items():
        assert (pair.a - together.pairs[layer].a).abs().max() < 1e-5
        assert (pair.b - together.pairs[layer].b).abs().max() < 1e-5
