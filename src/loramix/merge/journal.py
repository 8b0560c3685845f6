"""The folder a merge is written in until it is whole, and its journal.

    .OUT.part/journal.jsonl    {"key": ...}  {"tensor": ..., "sha256": ...}  ...

A merge that was killed is taken up by the same merge started again: what the journal says was
written is trusted after its bytes gave the same hash again, the rest is written anew. `OUT` appears
by a rename, when everything is in it and on the disk.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from uuid import uuid4

from loramix.errors import LoramixError, MergeError

JOURNAL = "journal.jsonl"
CHUNK = 8 << 20


@dataclass(frozen=True, slots=True)
class Staging:
    """A folder being written: `done` are the tensors that were, by an earlier run."""

    folder: Path
    done: dict[str, str]  # sha256 by name
    journal: IO[str]

    def record(self, name: str, sha256: str) -> None:
        """Remember that a tensor's bytes are in their file."""
        self.journal.write(json.dumps({"tensor": name, "sha256": sha256}) + "\n")
        self.journal.flush()

    def sweep(self, keep: Container[str]) -> None:
        """Delete what an earlier run left half written beside the files to keep."""
        for child in self.folder.iterdir():
            if child.name not in keep and child.name != JOURNAL:
                child.unlink()


@contextmanager
def staging(out: Path, key: str, *, replace: bool = False) -> Iterator[Staging]:
    """Write `out` aside; if the block ends well it is renamed there, else it stays to be resumed.

    What ends in an error of ours would end so again, and is deleted. `key` says what is being made:
    the parts of another merge are deleted. Raises MergeError if `out` is there already, or another
    process is writing it.
    """
    if out.exists() and not replace:
        raise MergeError(f"{out} exists; give another folder, or ask for it to be replaced.")
    folder = part_of(out)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / JOURNAL).open("a+", encoding="utf-8") as journal:
        try:
            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise MergeError(f"{out} is being written by another process; wait for it.") from error
        done = _read(journal, key)
        if done is None:
            Staging(folder, {}, journal).sweep(keep=())
            journal.truncate(0)
            journal.write(json.dumps({"key": key}) + "\n")
            journal.flush()
        try:
            yield Staging(folder, done or {}, journal)
        except LoramixError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        (folder / JOURNAL).unlink()
        settle(folder)
        old = out.parent / f".{out.name}.old-{uuid4().hex[:8]}"
        if out.exists():
            out.rename(old)
        folder.rename(out)
        _settle(out.parent)
        shutil.rmtree(old, ignore_errors=True)


def settle(folder: Path) -> None:
    """Return when all of a folder's files are on the disk, so that its name never outruns them."""
    for file in folder.iterdir():
        _settle(file)
    _settle(folder)


def _settle(place: Path) -> None:
    opened = os.open(place, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def part_of(out: Path) -> Path:
    """Where `out` is written until it is whole."""
    return out.parent / f".{out.name}.part"


def sha256_of(file: int, offset: int, size: int) -> str:
    """The hash of a range of a file."""
    state = hashlib.sha256()
    while size > 0:
        chunk = os.pread(file, min(CHUNK, size), offset)
        if not chunk:
            return ""
        state.update(chunk)
        offset, size = offset + len(chunk), size - len(chunk)
    return state.hexdigest()


def _read(journal: IO[str], key: str) -> dict[str, str] | None:
    """What an earlier run of the same merge wrote; None if there was none, or it is damaged."""
    journal.seek(0)
    try:
        lines = [line for line in journal if line.endswith("\n")]  # a last one may be cut off
        if not lines or json.loads(lines[0]) != {"key": key}:
            return None
        entries = [json.loads(line) for line in lines[1:]]
        return {entry["tensor"]: entry["sha256"] for entry in entries}
    except (ValueError, KeyError, TypeError):  # as a power cut may leave it
        return None
