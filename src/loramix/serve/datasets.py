"""Rows to train on, over HTTP, for admins: uploaded, looked at, and removed.

    POST   /v1/datasets/{name}/file      one file of rows, as a form     -> what was found in it
    GET    /v1/datasets, /v1/datasets/{name}
    GET    /v1/datasets/{name}/preview   rows as tokens, and which of them are learned
    GET    /v1/datasets/{name}/check     rows that cannot be learned, with their lines
    DELETE /v1/datasets/{name}

The name is the client's, the file's place is not: only its kind is read off what it was called.
"""

from __future__ import annotations

import asyncio
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel

from loramix.detached import OPEN
from loramix.errors import BadRequest, Conflict
from loramix.mix import check_name
from loramix.serve import uploads
from loramix.serve.service import ADMIN, Service, Serving
from loramix.train.data import Row, preview
from loramix.train.dataset import Sample, conversations, to_rows
from loramix.train.files import Problem
from loramix.train.recipe import plan
from loramix.train.registry import REPORTED, Dataset

router = APIRouter(prefix="/v1/datasets", tags=["Training"], dependencies=ADMIN)
Length = Annotated[int, Query(ge=1, description="Most tokens of a row.")]


class ProblemBody(BaseModel):
    line: int
    what: str


class DatasetBody(BaseModel):
    """A dataset; `problems` are the first hundred of its rows that no training can learn."""

    name: str
    kind: str
    shape: str
    bytes: int
    rows: int
    bad_rows: int
    problems: list[ProblemBody]
    changed: float


class DatasetList(BaseModel):
    data: list[DatasetBody]


class Piece(BaseModel):
    text: str
    learned: bool


class RowBody(BaseModel):
    line: int
    tokens: int
    learned_tokens: int
    pieces: list[Piece]


class PreviewBody(BaseModel):
    rows: list[RowBody]
    problems: list[ProblemBody]


class CheckBody(BaseModel):
    """What would be learned of the rows that were looked at; `twice` are those said before."""

    checked_rows: int
    bad_rows: int
    problems: list[ProblemBody]
    twice: int
    tokens: int
    learned_tokens: int
    longest_row: int


@router.get("")
async def list_(service: Serving) -> DatasetList:
    def listed() -> DatasetList:
        datasets = service.trains.datasets
        return DatasetList(data=[_body(datasets.get(name)) for name in datasets.names()])

    return await asyncio.to_thread(listed)


@router.get("/{name}")
async def show(name: str, service: Serving) -> DatasetBody:
    return await asyncio.to_thread(lambda: _body(service.trains.datasets.get(name)))


_FILE = {"type": "string", "format": "binary"}


@router.post("/{name}/file", status_code=201, openapi_extra=uploads.described("file", _FILE))
async def upload(
    name: str, request: Request, service: Serving, replace: bool = False
) -> DatasetBody:
    """Take in a file of rows: JSON, JSON lines, CSV, TSV, parquet or text, not compressed."""
    check_name(name)
    datasets = service.trains.datasets
    if not replace and name in await asyncio.to_thread(datasets.names):
        raise BadRequest(f"There is a dataset {name!r} already; ask for replace=true, or rename.")
    with uploads.stored(), TemporaryDirectory(prefix="loramix-") as folder:
        file = await _receive(request, Path(folder))
        kind = file.suffix.removeprefix(".")
        limit = service.limits.dataset_rows
        return _body(await asyncio.to_thread(datasets.add, name, file, kind, limit))


@router.get("/{name}/preview")
async def show_rows(
    name: str,
    service: Serving,
    start: Annotated[int, Query(ge=0)] = 0,
    rows: Annotated[int, Query(ge=1, le=50)] = 3,
    max_length: Length = 1024,
) -> PreviewBody:
    """Rows as the model reads them, in pieces that are learned or only read."""

    def previewed() -> PreviewBody:
        found, problems = _rows(service, name, start, rows, max_length, truncate=True)
        tokenizer = service.trains.base.tokenizer
        shown = [
            RowBody(
                line=sample.line,
                tokens=len(row.ids),
                learned_tokens=row.num_learned,
                pieces=[Piece(text=text, learned=so) for text, so in preview(tokenizer, row)],
            )
            for sample, row in found
        ]
        return PreviewBody(rows=shown, problems=_problems(problems))

    return await asyncio.to_thread(previewed)


@router.get("/{name}/check")
async def check(
    name: str,
    service: Serving,
    rows: Annotated[int, Query(ge=1, le=10_000)] = 1000,
    max_length: Length = 1024,
) -> CheckBody:
    """Read the first rows as a training would, with this base's tokenizer and chat template."""

    def checked() -> CheckBody:
        found, problems = _rows(service, name, 0, rows, max_length)
        return CheckBody(
            checked_rows=len(found) + len(problems),
            bad_rows=len(problems),
            problems=_problems(problems),
            twice=len(found) - len({row.ids for _, row in found}),
            tokens=sum(len(row.ids) for _, row in found),
            learned_tokens=sum(row.num_learned for _, row in found),
            longest_row=max((len(row.ids) for _, row in found), default=0),
        )

    return await asyncio.to_thread(checked)


@router.delete("/{name}")
async def delete(name: str, service: Serving) -> dict[str, str]:
    """Delete a dataset's file; Conflict while a job that is not over names it."""
    await asyncio.to_thread(_delete, service, name)
    return {"deleted": name}


async def _receive(request: Request, folder: Path) -> Path:
    """Write the one file of a form into a folder, named by its kind alone. BadRequest."""
    async with uploads.received(request, 1, "send one file") as parts:
        if len(parts) != 1:
            raise BadRequest("The form holds no file; send one, as `file`.")
        kind = Path(parts[0].filename or "").suffix.lower()
        place = folder / f"rows{kind if kind[1:].isalnum() else ''}"
        await uploads.write(parts[0], place)
        return place


def _rows(
    service: Service, name: str, start: int, count: int, max_length: int, *, truncate: bool = False
) -> tuple[list[tuple[Sample, Row]], list[Problem]]:
    """Some rows of a dataset as tokens, beside what cannot be learned among them."""
    training = service.trains
    dataset = training.datasets.get(name)
    looked = list(islice(conversations(dataset.file, dataset.shape), start, start + count))
    samples = [one for one in looked if not isinstance(one, Problem)]
    length = min(max_length, training.base.context)
    rows, problems = to_rows(training.base.tokenizer, samples, length, truncate=truncate)
    bad = [one for one in looked if isinstance(one, Problem)]
    return rows, sorted([*bad, *problems], key=lambda problem: problem.line)


def _delete(service: Service, name: str) -> None:
    training = service.trains
    training.datasets.get(name)
    with service.live.beginning:
        for job in service.kept.jobs.list(*OPEN):
            config = job.settings.get("config")
            if config and name in _named(config):
                raise Conflict(
                    f"The job {job.id} is {job.state} and reads {name!r}; stop it first."
                )
        training.datasets.remove(name)


def _named(config: dict[str, Any]) -> set[str]:
    """The datasets that a job reads."""
    experts = plan({**config, "output_dir": "."}).experts
    sources = [source for e in experts for source in (e.source, e.validation) if source]
    return {name for source in sources for name in source.names}


def _problems(problems: list[Problem]) -> list[ProblemBody]:
    return [ProblemBody(line=one.line, what=one.what) for one in problems[:REPORTED]]


def _body(dataset: Dataset) -> DatasetBody:
    report = dataset.report
    return DatasetBody(
        name=dataset.name,
        kind=dataset.file.suffix.removeprefix("."),
        shape=dataset.shape.kind,
        bytes=dataset.file.stat().st_size,
        rows=report.num_rows,
        bad_rows=report.num_bad,
        problems=_problems(list(report.problems)),
        changed=dataset.changed,
    )
