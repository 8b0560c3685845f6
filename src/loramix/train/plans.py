"""What a training file asks for, as values: which experts, from which rows, learned how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loramix.train.config import Run, Settings
from loramix.train.data import Learned
from loramix.train.dataset import MAX_BAD
from loramix.train.interleave import Mixing


@dataclass(frozen=True, slots=True)
class Source:
    """Where rows come from: a file, the hub, or names in a folder's dataset_info.json."""

    file: Path | None = None
    hub: str = ""  # owner/name, or owner/name@revision
    names: tuple[str, ...] = ()
    folder: Path = Path("data")
    mixing: Mixing = field(default_factory=Mixing)  # of several names

    def __str__(self) -> str:
        return str(self.file) if self.file else self.hub or ",".join(self.names)


@dataclass(frozen=True, slots=True)
class ExpertPlan:
    """One expert of a plan."""

    name: str
    source: Source
    settings: Settings
    validation: Source | None = None
    val_size: float = 0.0  # rows, or a share of them if below 1
    max_samples: int | None = None
    description: str = ""
    begins: tuple[str, ...] = ()  # adapters: names in the library, folders, files or hub ids
    anew: bool = False  # fresh factors over all of them; else the last one is learned on


@dataclass(frozen=True, slots=True)
class Export:
    """A whole model that is to be written: the base with adapters in its weights."""

    folder: Path
    base: str
    revision: str | None = None
    shard_bytes: int | None = None  # None: files as the base has them
    overwrite: bool = False
    adapters: tuple[str, ...] = ()  # of a file that trains nothing


@dataclass(frozen=True, slots=True)
class Plan:
    """What a training file asks for."""

    base: str
    experts: tuple[ExpertPlan, ...]
    output: Path
    run: Run
    library: Path | None = None  # where the experts go; None: the default one
    revision: str | None = None
    dtype: str = "auto"
    quantize: str = "none"  # the base
    overwrite: bool = False
    resume: bool | None = None  # True: there must be a checkpoint; False: begin anew all the same
    fit_router: bool = True
    learned: Learned = "answers"
    truncate: bool = True
    template: Mapping[str, Any] = field(default_factory=dict)
    system: str = ""
    max_bad: float = MAX_BAD
    log_every: float = 10  # steps, or a share of all
    plot: bool = False
    export: Export | None = None
    board: Path | None = None  # where TensorBoard's events go
    tf32: bool | None = None  # matrix products of a GPU with ten bits; None: as torch is set
    processes: int = 1  # begun on this machine; more may be begun by a launcher
    notes: tuple[str, ...] = ()

    @property
    def begins_anew(self) -> bool:
        """Whether checkpoints that lie in its folder are of no use."""
        return self.resume is False or (
            self.overwrite and self.resume is None and self.run.resume_from is None
        )
