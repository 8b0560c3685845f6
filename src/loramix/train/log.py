"""What a run says while it goes on: trainer_log.jsonl as LLaMA-Factory writes it."""

from __future__ import annotations

import json
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from loramix.train.config import every_steps
from loramix.train.loop import Progress


class TrainerLog:
    """Lines of trainer_log.jsonl, each with the expert it is of beside LLaMA-Factory's fields.

    When a run is taken up again, what it had written beyond its checkpoint is dropped.
    """

    def __init__(self, file: Path, *, every: float = 10) -> None:
        self.file, self.every = file, every
        self.began = time.monotonic()
        self._started: dict[str, int] = {}  # first step of each expert in this process

    def __call__(self, progress: Progress) -> None:
        if progress.name not in self._started:
            self._started[progress.name] = progress.step
            self._forget(progress.name, progress.step)
        last = progress.step == progress.num_steps
        if progress.validation is not None:
            judged = {"eval_loss": progress.validation, "eval_accuracy": progress.accuracy}
            self._write(progress, **{key: v for key, v in judged.items() if v is not None})
        if last or progress.step % every_steps(self.every, progress.num_steps) == 0:
            self._write(progress, loss=progress.loss, lr=progress.rate, grad_norm=progress.norm)

    def _write(self, progress: Progress, **measured: float) -> None:
        elapsed = time.monotonic() - self.began
        done = progress.step - self._started[progress.name] + 1
        left = elapsed / done * (progress.num_steps - progress.step)
        line = {
            "expert": progress.name,
            "current_steps": progress.step,
            "total_steps": progress.num_steps,
            **measured,
            "epoch": round(progress.epoch, 4),
            "percentage": round(100 * progress.step / progress.num_steps, 2),
            "elapsed_time": str(timedelta(seconds=int(elapsed))),
            "remaining_time": str(timedelta(seconds=int(left))),
            "throughput": round(progress.tokens_per_s, 2),
        }
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(line) + "\n")

    def _forget(self, name: str, step: int) -> None:
        if not self.file.exists():
            return
        kept = [e for e in entries(self.file) if e["expert"] != name or e["current_steps"] < step]
        new = self.file.with_suffix(".new")
        new.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")
        new.replace(self.file)


def entries(file: Path) -> list[dict[str, Any]]:
    """What a log holds; a last line that was cut short is left out."""
    found = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return found
