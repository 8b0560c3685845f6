"""What a run says while it goes on: trainer_log.jsonl as LLaMA-Factory writes it, and a plot."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from loramix.train.loop import Progress

COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5")
WIDTH, HEIGHT, MARGIN = 640, 320, 48


class TrainerLog:
    """Lines of trainer_log.jsonl, each with the expert it is of beside LLaMA-Factory's fields.

    When a run is taken up again, what it had written beyond its checkpoint is dropped.
    """

    def __init__(self, file: Path, *, every: int = 10) -> None:
        self.file, self.every = file, every
        self.began = time.monotonic()
        self._started: dict[str, int] = {}  # first step of each expert in this process

    def __call__(self, progress: Progress) -> None:
        if progress.name not in self._started:
            self._started[progress.name] = progress.step
            self._forget(progress.name, progress.step)
        last = progress.step == progress.num_steps
        if progress.validation is not None:
            self._write(progress, eval_loss=progress.validation)
        if last or progress.step % self.every == 0:
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


def loss_plot(log: Sequence[dict[str, Any]]) -> str:
    """An SVG of the losses: a line an expert, dots where it was validated. Empty without losses."""
    names = list(dict.fromkeys(entry["expert"] for entry in log))
    points = [(e["current_steps"], e["loss"] if "loss" in e else e["eval_loss"]) for e in log]
    if not points:
        return ""
    most = max(step for step, _ in points)
    top = max(loss for _, loss in points) or 1.0

    def place(step: float, loss: float) -> tuple[float, float]:
        x = MARGIN + step / most * (WIDTH - 2 * MARGIN)
        return round(x, 1), round(HEIGHT - MARGIN - loss / top * (HEIGHT - 2 * MARGIN), 1)

    parts = [_axes(most, top)]
    for n, name in enumerate(names):
        colour = COLOURS[n % len(COLOURS)]
        own = [entry for entry in log if entry["expert"] == name]
        line = [place(e["current_steps"], e["loss"]) for e in own if "loss" in e]
        dots = [place(e["current_steps"], e["eval_loss"]) for e in own if "eval_loss" in e]
        parts.append(_curve(line, dots, colour))
        parts.append(
            f'<text x="{WIDTH - MARGIN + 4}" y="{MARGIN + 14 * n}" fill="{colour}">'
            f"{escape(name)}</text>"
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH + 80} {HEIGHT}" '
        f'font-family="sans-serif" font-size="11">{"".join(parts)}</svg>\n'
    )


def _axes(most: int, top: float) -> str:
    left, bottom = MARGIN, HEIGHT - MARGIN
    return (
        f'<path d="M{left} {MARGIN}V{bottom}H{WIDTH - MARGIN}" fill="none" stroke="#888"/>'
        f'<text x="4" y="{MARGIN}" fill="#888">{top:.2f}</text>'
        f'<text x="{left - 12}" y="{bottom}" fill="#888">0</text>'
        f'<text x="{WIDTH - MARGIN}" y="{bottom + 16}" fill="#888">step {most}</text>'
        f'<text x="4" y="{MARGIN - 16}" fill="#888">nats per learned token; dots: validation</text>'
    )


def _curve(
    line: Iterable[tuple[float, float]], dots: Iterable[tuple[float, float]], colour: str
) -> str:
    path = " ".join(f"{x},{y}" for x, y in line)
    marks = "".join(f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>' for x, y in dots)
    return f'<polyline points="{path}" fill="none" stroke="{colour}"/>{marks}'
