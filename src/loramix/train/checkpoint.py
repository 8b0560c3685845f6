"""The state of a run on disk, from which it goes on as if nothing had happened.

    checkpoint-00000120/
      state.safetensors   of every expert: factors, optimizer, the best state so far
      state.json          round, steps, best losses, and what the run is of

A folder appears whole or not at all. Data order and dropout are functions of seed and step, so no
random state need be kept.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loramix.base import Base
from loramix.errors import TrainError
from loramix.formats.aside import aside
from loramix.formats.peft import digest
from loramix.train.config import Run
from loramix.train.learner import Course, Learner, rows_digest
from loramix.train.scaling import LossScale

NUMBERS = ("step", "lowest", "misses")  # of a learner
TENSORS, STATE = "state.safetensors", "state.json"


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """Those of one run, in its folder."""

    folder: Path
    keep: int
    of_run: str  # fingerprint of base, rows and settings
    learners: Sequence[Learner]

    @classmethod
    def of(cls, run: Run, base: Base, learners: Sequence[Learner]) -> Checkpoints | None:
        if run.folder is None:
            return None
        return cls(run.folder, run.keep, _fingerprint(base, run, learners), learners)

    def save(self, round: int) -> None:
        place = self.folder / f"checkpoint-{round:08d}"
        state = {
            "round": round,
            "of_run": self.of_run,
            "experts": {learner.name: _numbers(learner) for learner in self.learners},
        }
        with aside(place, replace=True) as new:
            new.mkdir()
            tensors = {
                f"{n}.{key}": tensor.detach().contiguous()
                for n, learner in enumerate(self.learners)
                for key, tensor in _tensors(learner).items()
            }
            save_file(tensors, new / TENSORS)
            (new / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
        until = [other for other in found(self.folder) if other <= place]
        for old in until[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)

    def restore(self, place: Path | None = None) -> int:
        """Take up this checkpoint, or the newest one: the number of its round, 0 if there is none.

        Raises TrainError if it is of another run, damaged, or none.
        """
        if place is not None and not (place / STATE).exists():
            raise TrainError(
                f"{place} is no checkpoint of loramix: it has no {STATE}; to begin from an "
                f"adapter's weights give it as adapter_name_or_path."
            )
        place = place or next(reversed(found(self.folder)), None)
        if place is None:
            return 0
        try:
            state = json.loads((place / STATE).read_text(encoding="utf-8"))
            tensors = load_file(place / TENSORS)
            same = state["of_run"] == self.of_run
        except Exception as error:  # whatever somebody else made of our files
            raise TrainError(
                f"{place} is damaged ({error}); remove it to go on from an older one."
            ) from error
        if not same:
            raise TrainError(
                f"{place} is of a run with other rows, settings or another base; train into "
                f"another folder, or remove the checkpoints to begin anew (overwrite_output_dir)."
            )
        for n, learner in enumerate(self.learners):
            _load(learner, state["experts"][learner.name], _under(f"{n}.", tensors))
        return int(state["round"])


def found(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    return sorted(folder.glob("checkpoint-*"))


def _fingerprint(base: Base, run: Run, learners: Sequence[Learner]) -> str:
    told = hashlib.sha256(f"{base.fingerprint} {base.dtype} {base.quantized} {run.bf16}".encode())
    for learner in learners:
        told.update(json.dumps(_settings(learner.course), sort_keys=True).encode())
        for rows in (learner.course.rows, learner.course.validation):
            told.update(rows_digest(rows).encode())
        for pairs in (learner.course.begun.pairs, learner.course.begun.below):
            told.update(digest(pairs).encode() if pairs else b"")
    return told.hexdigest()


def _settings(course: Course) -> dict[str, Any]:
    return asdict(course.settings) | {"name": course.card.name}


def _numbers(learner: Learner) -> dict[str, Any]:
    told = {name: getattr(learner, name) for name in NUMBERS}
    return told | {"loss_scale": asdict(learner.loss_scale)}


def _tensors(learner: Learner) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {f"weight.{name}": w for name, w in learner.weights.items()}
    tensors |= {f"best.{name}": w for name, w in learner.best.items()}
    for name, weight in learner.weights.items():
        for key, value in learner.optimizer.state[weight].items():
            if key.startswith("qmap"):  # of AdamW in eight bits: one table that all share
                tensors[f"optimizer.{key}.{name}"] = value.clone()
            elif isinstance(value, Tensor):
                tensors[f"optimizer.{key}.{name}"] = value
            elif isinstance(value, int):  # AdamW in eight bits counts its steps in Python
                tensors[f"count.{key}.{name}"] = torch.tensor(value)
    return tensors


def _load(learner: Learner, numbers: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    device = learner.mixed.model.device
    for name in NUMBERS:
        setattr(learner, name, numbers[name])
    learner.loss_scale = LossScale(**numbers["loss_scale"])
    learner.best = {n: t.to(device) for n, t in _under("best.", tensors).items()}
    for name, value in _under("weight.", tensors).items():
        learner.weights[name].data.copy_(value)
    for key, value in _under("optimizer.", tensors).items():
        part, _, name = key.partition(".")
        place = value.device if part == "step" else device
        learner.optimizer.state[learner.weights[name]][part] = value.to(place)
    for key, value in _under("count.", tensors).items():
        part, _, name = key.partition(".")
        learner.optimizer.state[learner.weights[name]][part] = int(value)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
