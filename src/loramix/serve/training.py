"""Where a server's trainings run, and what a client may have them read and write.

A client sends the keys of a training file. What they read lies among the uploaded datasets or
inside the server's roots; what is written, and which base learns, is the server's to say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loramix.errors import BadRequest, TrainError
from loramix.library import Library
from loramix.serve.roots import inside
from loramix.train.dataset import REGISTRY, registry
from loramix.train.plans import ExpertPlan, Plan, Source
from loramix.train.recipe import plan
from loramix.train.registry import Registry

if TYPE_CHECKING:
    from loramix.base import Base

PATHS = ("data", "eval_data", "dataset_dir")  # keys whose values are read from the disk
OWN = {
    "output_dir": "the server keeps checkpoints beside the job",
    "library": "experts go to the server's library",
    "logging_dir": "TensorBoard's events lie beside the checkpoints",
    "resume_from_checkpoint": "a job that is resumed goes on from its own",
    "export_dir": "whole models are merged with `loramix merge`",
    "processes": "a job shares the machine with the server",
}


@dataclass(frozen=True, slots=True)
class Training:
    """Where trainings run, and over what."""

    folder: Path  # of datasets and jobs
    database: str  # its URL, as their processes open it
    model: str  # the base, as `open_base` takes it
    base: Base  # the same, as it is served
    revision: str | None = None
    refits: bool = True  # whether the library's router is taken up when a job has fitted it anew

    @property
    def datasets(self) -> Registry:
        return Registry(self.folder / "datasets")

    def config(
        self, asked: Mapping[str, Any], library: Path, roots: tuple[Path, ...]
    ) -> dict[str, Any]:
        """The keys of a training file as a job of this server may have them. Raises BadRequest."""
        for key, reason in OWN.items():
            if key in asked:
                raise BadRequest(f"{key} is not a client's to set: {reason}; leave it out.")
        base = asked.get("model_name_or_path", self.model)
        if base not in (self.model, self.base.id):
            raise BadRequest(
                f"model_name_or_path is {str(base)[:80]!r}; this server trains experts of the base "
                f"it serves, {self.base.id!r}; leave the key out."
            )
        if "experts" not in asked and "name" not in asked and "run_name" not in asked:
            raise BadRequest("name is missing; expected what the expert is to be called.")
        values = {"dataset_dir": str(self.datasets.folder), **_read_here(asked, roots)}
        if isinstance(experts := values.get("experts"), dict):
            values["experts"] = {
                name: _read_here(own, roots) if isinstance(own, dict) else own
                for name, own in experts.items()
            }
        values |= {"model_name_or_path": self.model, "library": str(library)}
        return values if self.revision is None else {**values, "model_revision": self.revision}

    def planned(self, config: Mapping[str, Any], roots: tuple[Path, ...]) -> Plan:
        """What a job with these keys does; BadRequest for rows that it may not read, or TrainError.

        Rows themselves are read by the job.
        """
        found = plan({**config, "output_dir": "."})
        for expert in found.experts:
            _check_begins(expert, Library(config["library"]))
            for source in (expert.source, expert.validation):
                if source is not None and source.names:
                    self._check_names(source, roots)
        return found

    def _check_names(self, source: Source, roots: tuple[Path, ...]) -> None:
        own = source.folder == self.datasets.folder
        known = registry(source.folder) if (source.folder / REGISTRY).exists() or not own else {}
        for name in source.names:
            if name not in known:
                listed = ", ".join(sorted(known)[:10]) or "none yet"
                raise BadRequest(f"There is no dataset {name[:80]!r}; known are {listed}.")
            file = known[name].get("file_name") if isinstance(known[name], dict) else None
            if not isinstance(file, str):
                raise BadRequest(f"The dataset {name!r} is no file on this server; upload it.")
            if not own:
                place = source.folder / file
                inside(str(place if place.exists() else f"{place}.gz"), roots, f"dataset {name!r}")


def _check_begins(expert: ExpertPlan, library: Library) -> None:
    """BadRequest for a beginning that is none of the library's adapters."""
    for name in expert.begins:
        if name not in library:
            raise BadRequest(
                f"adapter_name_or_path names {name[:80]!r}; expected adapters that this server has."
            )


def _read_here(values: Mapping[str, Any], roots: tuple[Path, ...]) -> dict[str, Any]:
    """The same keys, those that are read from the disk as places that may be read."""
    found = dict(values)
    for key in PATHS:
        if found.get(key) is not None:
            if not isinstance(found[key], str):
                raise TrainError(f"{key} is {found[key]!r}; expected text.")
            found[key] = str(inside(found[key], roots, key))
    return found
