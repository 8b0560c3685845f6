"""A folder of datasets with names: what was uploaded, kept as LLaMA-Factory keeps it.

    datasets/
      dataset_info.json   each name's file, and how its columns are read
      support.jsonl

So `dataset: support` with this folder as `dataset_dir` trains on it here as anywhere.
"""

from __future__ import annotations

import difflib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loramix.errors import NoRecord, TrainError
from loramix.formats.aside import aside
from loramix.mix import check_name
from loramix.train.dataset import REGISTRY, conversations, registry
from loramix.train.files import Problem, read
from loramix.train.shapes import Shape, declared, detect

KINDS = ("json", "jsonl", "csv", "tsv", "parquet", "txt")  # not gzipped: that can be any size
REPORTED = 100  # bad rows that a report lists


@dataclass(frozen=True, slots=True)
class Report:
    """What the rows of a file are, line by line."""

    num_rows: int  # that can be learned
    num_bad: int
    problems: tuple[Problem, ...]  # the first of those that cannot


@dataclass(frozen=True, slots=True)
class Dataset:
    """One of a registry's."""

    name: str
    file: Path
    shape: Shape
    report: Report
    changed: float  # seconds since 1970


class Registry:
    """The datasets of a folder. Changes of several at once follow one another."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def names(self) -> list[str]:
        return sorted(self._entries())

    def get(self, name: str) -> Dataset:
        """NoRecord if there is none."""
        entries = self._entries()
        if name not in entries:
            close = difflib.get_close_matches(name, entries, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "upload it first."
            raise NoRecord(f"There is no dataset {name[:80]!r}; {hint}")
        entry = entries[name]
        told = entry["report"]
        report = Report(
            told["num_rows"], told["num_bad"], tuple(Problem(**one) for one in told["problems"])
        )
        file = self.folder / entry["file_name"]
        return Dataset(name, file, declared(entry, name, []), report, entry["changed"])

    def add(self, name: str, file: Path, kind: str, max_rows: int) -> Dataset:
        """Take in a file of rows under a name, over what has it, once its rows were looked at.

        Raises TrainError if it is of no kind or shape that can be read, if no row of it can be
        learned, and if it has more than `max_rows`.
        """
        check_name(name)
        if f"{name}.json" == REGISTRY:
            raise TrainError(f"{name!r} is what the list of datasets is called; give another name.")
        if kind not in KINDS:
            raise TrainError(f"The file is a {kind[:20]!r}; expected {', '.join(KINDS)}.")
        shape = _shape(file)
        entry: dict[str, Any] = {
            "file_name": f"{name}.{kind}",
            "formatting": "alpaca" if shape.kind == "text" else shape.kind,
            "columns": dict(shape.columns),
            "tags": dict(shape.tags),
            "report": asdict(survey(file, shape, max_rows)),
            "changed": time.time(),
        }
        with self._changing() as entries:
            with aside(self.folder / entry["file_name"], replace=True) as new:
                shutil.copyfile(file, new)
            entries[name] = entry
        return self.get(name)

    def remove(self, name: str) -> None:
        """Forget a dataset and its file; NoRecord if there is none."""
        self.get(name)
        with self._changing() as entries:
            entries.pop(name, None)

    def _entries(self) -> dict[str, Any]:
        return registry(self.folder) if (self.folder / REGISTRY).exists() else {}

    @contextmanager
    def _changing(self) -> Iterator[dict[str, Any]]:
        """The entries, to be changed; written when the block ends well.

        Files that no entry names any more go then.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        place = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(place, fcntl.LOCK_EX)
            entries = self._entries()
            before = _files(entries)
            yield entries
            new = self.folder / f".{REGISTRY}.new"
            new.write_text(json.dumps(entries, indent=1, ensure_ascii=False), encoding="utf-8")
            new.replace(self.folder / REGISTRY)
            for file in before - _files(entries):
                (self.folder / file).unlink(missing_ok=True)
        finally:
            os.close(place)


def _files(entries: Mapping[str, Any]) -> set[str]:
    return {entry["file_name"] for entry in entries.values()}


def survey(file: Path, shape: Shape, max_rows: int) -> Report:
    """Look at every row, keeping none. Raises TrainError as `Registry.add` does."""
    good, problems = 0, []
    for found in conversations(file, shape):
        if isinstance(found, Problem):
            problems.append(found)
        else:
            good += 1
        if good + len(problems) > max_rows:
            raise TrainError(f"The file has more than {max_rows:,} rows; upload it in parts.")
    if not good:
        listed = "; ".join(map(str, problems[:5])) or "it has none"
        raise TrainError(f"No row of the file can be learned: {listed}.")
    return Report(good, len(problems), tuple(problems[:REPORTED]))


def _shape(file: Path) -> Shape:
    for found in read(file):
        if not isinstance(found, Problem) and isinstance(found[1], dict):
            return detect(found[1])
    raise TrainError("No row of the file is an object with columns; expected at least one.")
