"""Datasets by file or by their entry in dataset_info.json, as samples ready to be tokenised."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loramix.chat import Example
from loramix.errors import TrainError
from loramix.train.data import Learned, Row, tokenise
from loramix.train.files import Problem, Record, read
from loramix.train.interleave import Mixing
from loramix.train.online import fetch_rows
from loramix.train.shapes import Shape, Unfit, declared, detect

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONCAT = Mixing()
REGISTRY = "dataset_info.json"
MAX_BAD = 0.05  # share of the rows
LISTED = 5  # problems that a message shows


@dataclass(frozen=True, slots=True)
class Sample:
    """A conversation, where it comes from, and the tools it may call."""

    example: Example
    file: str
    line: int
    tools: Sequence[Any] = ()


@dataclass(frozen=True, slots=True)
class Loaded:
    """The rows of a dataset that can be learned, and the ones that cannot."""

    samples: Sequence[Sample]
    problems: Sequence[Problem]
    notes: Sequence[str] = field(default=())


def load(path: Path, shape: Shape | None = None, *, max_rows: int | None = None) -> Loaded:
    """The rows of a file, in the shape that their columns suggest if none is given."""
    return _loaded(conversations(path, shape), max_rows)


def load_hub(
    id: str,
    shape: Shape | None = None,
    *,
    subset: str | None = None,
    split: str = "train",
    max_rows: int | None = None,
) -> Loaded:
    """The rows of a dataset on the hub, "owner/name" or "owner/name@revision"."""
    commit, rows = fetch_rows(id, subset, split)
    found = _loaded(_samples(rows, id, shape), max_rows)
    where = f"at commit {commit}" if commit else "from the cache, as the hub is not asked"
    return Loaded(found.samples, found.problems, [f"{id} ({split}) was read {where}."])


def _loaded(rows: Iterable[Sample | Problem], max_rows: int | None) -> Loaded:
    samples: list[Sample] = []
    problems: list[Problem] = []
    for found in rows:
        if isinstance(found, Problem):
            problems.append(found)
        else:
            samples.append(found)
        if max_rows is not None and len(samples) >= max_rows:
            break
    return Loaded(samples, problems)


def conversations(path: Path, shape: Shape | None = None) -> Iterator[Sample | Problem]:
    """The rows of a file one by one, each as a sample or as what is wrong with it."""
    return _samples(read(path), path.name, shape)


def _samples(
    rows: Iterable[Record | Problem], source: str, shape: Shape | None
) -> Iterator[Sample | Problem]:
    for found in rows:
        if isinstance(found, Problem):
            yield found
            continue
        line, row = found
        if shape is None and isinstance(row, dict):
            shape = detect(row)
        try:
            if shape is None:
                raise Unfit(f"a {type(row).__name__}; expected an object with columns")
            example, tools = shape.conversation(row)
            yield Sample(example, source, line, tools)
        except Unfit as error:
            yield Problem(line, str(error))


def load_named(
    names: Sequence[str], folder: Path, *, max_rows: int | None = None, mixing: Mixing = CONCAT
) -> Loaded:
    """Datasets of a folder's dataset_info.json, at most `max_rows` of each, as one."""
    known = registry(folder)
    parts = []
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(known)}."
            raise TrainError(f"No dataset {name!r} in {folder / REGISTRY}; {hint}")
        parts.append(_entry(name, known[name], folder, max_rows))
    return Loaded(
        mixing([part.samples for part in parts]),
        [problem for part in parts for problem in part.problems],
        [note for part in parts for note in part.notes],
    )


def accepted(loaded: Loaded, what: str, *, max_bad: float = MAX_BAD) -> Sequence[Sample]:
    """The good rows; TrainError, listing the first bad ones, if those are more than `max_bad`."""
    bad, total = len(loaded.problems), len(loaded.problems) + len(loaded.samples)
    if total == 0:
        raise TrainError(f"{what} has no rows; expected at least one.")
    if bad and (bad > max_bad * total or not loaded.samples):
        raise TrainError(
            f"{bad} of {total} rows of {what} cannot be learned, more than {max_bad:.0%}: "
            f"{listed(loaded.problems)}. Mend them, or allow more (max_bad_rows)."
        )
    return loaded.samples


def listed(problems: Sequence[Problem]) -> str:
    shown = "; ".join(str(problem) for problem in problems[:LISTED])
    return shown + (f"; and {len(problems) - LISTED} more" if len(problems) > LISTED else "")


def to_rows(
    tokenizer: PreTrainedTokenizerBase,
    samples: Iterable[Sample],
    max_length: int,
    *,
    learned: Learned = "answers",
    template: Mapping[str, Any] | None = None,
    truncate: bool = False,
) -> tuple[list[tuple[Sample, Row]], list[Problem]]:
    """Each sample as tokens, beside those that cannot be."""
    rows, problems = [], []
    for sample in samples:
        told = {**(template or {}), **({"tools": list(sample.tools)} if sample.tools else {})}
        try:
            row = tokenise(
                tokenizer,
                sample.example,
                max_length,
                learned=learned,
                template=told,
                truncate=truncate,
            )
            rows.append((sample, row))
        except TrainError as error:
            problems.append(Problem(sample.line, str(error).rstrip(".")))
    return rows, problems


def split(
    samples: Sequence[Sample], size: float, seed: int = 0
) -> tuple[list[Sample], list[Sample]]:
    """Rows to learn and rows to validate by: `size` of them, or a share if it is below 1.

    The choice hangs on each row's text alone: rows that say the same are on the same side, and a
    file that grows keeps the sides of the rows it had, but for a few.
    """
    count = round(size * len(samples)) if size < 1 else int(size)
    if count <= 0:
        return list(samples), []
    if count >= len(samples):
        raise TrainError(
            f"{count} of {len(samples)} rows to validate by leave none to learn; ask for fewer."
        )
    keys = [_key(sample, seed) for sample in samples]
    limit = sorted(keys)[count - 1]
    kept = [s for s, key in zip(samples, keys, strict=True) if key > limit]
    if not kept:
        raise TrainError("All rows say the same; none is left to learn beside the validation rows.")
    return kept, [s for s, key in zip(samples, keys, strict=True) if key <= limit]


def _key(sample: Sample, seed: int) -> str:
    text = repr([(m.role, m.content) for m in sample.example.messages])
    return hashlib.sha256(f"{seed} {text}".encode()).hexdigest()


def registry(folder: Path) -> dict[str, Any]:
    """The entries of a folder's dataset_info.json. Raises TrainError."""
    file = folder / REGISTRY
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise TrainError(
            f"{file} does not exist; expected LLaMA-Factory's list of datasets (dataset_dir), "
            f"or a file of rows (--data)."
        ) from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise TrainError(f"{file} is not JSON ({error}); mend it.") from error
    if not isinstance(found, dict):
        raise TrainError(f"{file} is no object; expected a dataset under each name.")
    return found


def _entry(name: str, entry: Any, folder: Path, max_rows: int | None) -> Loaded:
    if not isinstance(entry, dict):
        raise TrainError(f"The dataset {name!r} is no object; expected file_name or hf_hub_url.")
    notes: list[str] = []
    shape = declared(entry, name, notes)
    limits = [n for n in (max_rows, entry.get("num_samples")) if n is not None]
    limit = min(limits, default=None)
    if _text(entry, "hf_hub_url", name):
        subset, split = _text(entry, "subset", name), _text(entry, "split", name)
        loaded = load_hub(
            entry["hf_hub_url"], shape, subset=subset, split=split or "train", max_rows=limit
        )
        return Loaded(loaded.samples, loaded.problems, [*notes, *loaded.notes])
    if not _text(entry, "file_name", name):
        raise TrainError(
            f"The dataset {name!r} has neither hf_hub_url nor file_name; download it into {folder} "
            f"and give its file_name."
        )
    path = folder / entry["file_name"]
    if not path.exists() and path.with_name(path.name + ".gz").exists():
        path = path.with_name(path.name + ".gz")
    loaded = load(path, shape, max_rows=limit)
    return Loaded(loaded.samples, loaded.problems, notes)


def _text(entry: Mapping[str, Any], key: str, name: str) -> str | None:
    found = entry.get(key)
    if found is not None and not isinstance(found, str):
        raise TrainError(f"{key} of the dataset {name!r} is {found!r}; expected text.")
    return found
