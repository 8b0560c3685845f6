"""Trainings over HTTP, for admins: begun, followed, stopped, resumed and forgotten.

    POST   /v1/jobs               {"config": {...}}: the keys of a training file    -> a job
    GET    /v1/jobs, /v1/jobs/{id}
    GET    /v1/jobs/{id}/events   its progress as server-sent events; replayed after Last-Event-ID
    GET    /v1/jobs/{id}/log      the end of what it printed
    POST   /v1/jobs/{id}/stop     with a checkpoint; POST /v1/jobs/{id}/resume goes on from it
    DELETE /v1/jobs/{id}          with its log and checkpoints; its experts stay

A job is a process of its own (detached.py): it goes on when the server ends, or is killed.
"""

from __future__ import annotations

import asyncio
import os
import re
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Header, Response
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, Field

from loramix.detached import LOG, OPEN, ask_to_stop, is_stopping, resume, seen, start
from loramix.detached import delete as forget
from loramix.errors import BadRequest, Conflict
from loramix.jobs import check_names
from loramix.serve.events import EventStream
from loramix.serve.following import END, events, latest
from loramix.serve.openai import STREAMED
from loramix.serve.service import ADMIN, Service, Serving, Way
from loramix.serve.wire import Wire
from loramix.store.records import Job, State
from loramix.train.feed import EVENTS, read_events

router = APIRouter(prefix="/v1/jobs", tags=["Training"], dependencies=ADMIN)
TAIL = 1 << 16  # bytes of a log
TEXT: dict[str, Any] = {"content": {"text/plain": {"schema": {"type": "string"}}}}


class JobAsked(Wire):
    config: dict[str, Any] = Field(description="The keys of a training file (docs/training.md).")


class JobBody(BaseModel):
    id: str
    name: str
    experts: list[str]
    state: State
    stopping: bool
    created: float
    started: float | None
    ended: float | None
    error: str
    config: dict[str, Any] | None = Field(description="null for a job of the command line.")
    progress: dict[str, dict[str, Any]] = Field(description="The last event of each expert.")


class JobList(BaseModel):
    data: list[JobBody]


@router.post("", status_code=201)
async def create(asked: JobAsked, service: Serving) -> JobBody:
    """Begin a training; it waits while another is at work on this machine."""
    return await asyncio.to_thread(_create, asked.config, service)


@router.get("")
async def list_(service: Serving) -> JobList:
    """All jobs, oldest first."""

    def listed() -> JobList:
        store = service.kept
        return JobList(data=[_body(seen(store, job)) for job in store.jobs.list()])

    return await asyncio.to_thread(listed)


@router.get("/{id}")
async def show(id: str, service: Serving) -> JobBody:
    return await asyncio.to_thread(lambda: _body(_found(service, id)))


@router.get("/{id}/events", responses={200: STREAMED, 204: {}})
async def follow(
    id: str,
    service: Serving,
    trip: Way,
    last_event_id: Annotated[str, Header()] = "",
) -> Response:
    """What happens in a job, from its beginning or behind the event that was read last.

    Events are `progress`, `note`, `judged` (losses of base, expert and routed), `state`, and as the
    last one `end`, with the state and the error. 204 if that was read: nothing more will come.
    """
    job = await asyncio.to_thread(_found, service, id)
    place, was_ended = _place(last_event_id)
    if was_ended and job.state not in OPEN:
        return Response(status_code=204)
    await asyncio.to_thread(lambda: next(read_events(Path(job.folder) / EVENTS, place), None))
    return EventStream(service, trip, events(service, job, place), {}, is_endless=True)


@router.get("/{id}/log", responses={200: TEXT})
async def log(id: str, service: Serving) -> Response:
    """The last 64 KiB of what it printed."""
    job = await asyncio.to_thread(_found, service, id)
    return PlainTextResponse(await asyncio.to_thread(_tail, Path(job.folder) / LOG))


@router.post("/{id}/stop", status_code=202)
async def stop(id: str, service: Serving) -> JobBody:
    """Have it end with its state kept, as soon as it can; its events tell when it has."""
    return await asyncio.to_thread(lambda: _body(ask_to_stop(service.kept, _found(service, id))))


@router.post("/{id}/resume", status_code=202)
async def go_on(id: str, service: Serving) -> JobBody:
    """Go on with a job that was stopped, failed or killed, from its newest checkpoint."""

    def resumed() -> JobBody:
        resume(service.kept, _found(service, id), service.trains.database)
        return _body(_found(service, id))

    return await asyncio.to_thread(resumed)


@router.delete("/{id}")
async def delete(id: str, service: Serving) -> dict[str, str]:
    """Forget a job that is over, its log and its checkpoints. Its experts stay."""
    await asyncio.to_thread(lambda: forget(service.kept, _found(service, id)))
    return {"deleted": id}


def _create(asked: dict[str, Any], service: Service) -> JobBody:
    training, library = service.trains, service.lm.library
    config = training.config(asked, library.folder.absolute(), service.roots)
    planned = training.planned(config, service.roots)
    check_names(planned, library)
    names = [expert.name for expert in planned.experts]
    settings = {
        "asked": asked,
        "config": config,
        "experts": names,
        "own_library": str(library.folder.absolute()),
    }
    root, url = training.folder / "jobs", training.database
    with service.live.beginning:
        _check_free(service, names)
        return _body(start(service.kept, "train", ", ".join(names), settings, root, url))


def _check_free(service: Service, names: list[str]) -> None:
    """Conflict if a job that is not over makes an expert of one of these names."""
    store = service.kept
    for job in store.jobs.list(*OPEN):
        same = {*names} & {*job.settings.get("experts", ())}
        if same and seen(store, job).state in OPEN:
            raise Conflict(
                f"The job {job.id} is {job.state} and makes {', '.join(sorted(same))}; wait for "
                f"it, stop it, or give another name."
            )


def _found(service: Service, id: str) -> Job:
    return seen(service.kept, service.kept.jobs.get(id))


def _place(last: str) -> tuple[int, bool]:
    """Where the event with this id ends, and whether it was the last one of a run."""
    if not last:
        return 0, False
    known = re.fullmatch(rf"([0-9]{{1,15}})(\.{END})?", last)
    if known is None:
        raise BadRequest(f"Last-Event-ID is {last[:80]!r}; expected the id of a job's event.")
    return int(known[1]), known[2] is not None


def _tail(file: Path) -> str:
    try:
        with file.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - TAIL))
            return log.read().decode(errors="replace")
    except FileNotFoundError:
        return ""


def _body(job: Job) -> JobBody:
    return JobBody(
        id=job.id,
        name=job.name,
        experts=job.settings.get("experts", job.name.split(", ")),
        state=job.state,
        stopping=is_stopping(job),
        created=job.created,
        started=job.started,
        ended=job.ended,
        error=job.error,
        config=job.settings.get("asked"),
        progress=latest(Path(job.folder) / EVENTS),
    )
