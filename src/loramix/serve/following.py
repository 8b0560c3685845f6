"""A job followed from outside: its events as they come, and the server's own eye on its end."""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from time import monotonic
from typing import Any

from loramix.detached import OPEN, is_stopping, seen
from loramix.errors import LoramixError, NoRecord, StoreError
from loramix.serve.service import Service
from loramix.store.records import Job
from loramix.train.feed import EVENTS, Event, read_events

log = logging.getLogger("loramix.serve")

POLL_S = 0.25
WATCH_S = 1.0
BEAT_S = 15.0  # between two signs of life
TAIL = 1 << 16  # bytes of events among which the latest are looked for
END = "end"


async def events(service: Service, job: Job, place: int) -> AsyncGenerator[bytes]:
    """A job's events behind a place in its file, its states as they change, and its end.

    Ends without that last event when the server does: whoever asks again is told the rest.
    """
    yield b"retry: 3000\n\n"
    told: dict[str, Any] = {}
    heard = monotonic()
    while not service.live.is_ending:
        try:  # the state first: what a process told before its end is read after it
            job = await asyncio.to_thread(_seen, service, job)
        except NoRecord:
            yield _event(f"{place}.{END}", END, {"state": "deleted", "error": ""})
            return
        if told != (state := {"state": job.state, "stopping": is_stopping(job)}):
            told, heard = state, monotonic()
            yield _event(str(place), "state", state)
        while found := await asyncio.to_thread(_read, job, place):
            for place, facts in found:
                yield _event(str(place), facts.pop("event"), facts)
            heard = monotonic()
        if job.state not in OPEN:
            yield _event(f"{place}.{END}", END, {"state": job.state, "error": job.error})
            return
        if monotonic() - heard > BEAT_S:
            heard = monotonic()
            yield b": still here\n\n"
        await asyncio.sleep(POLL_S)


def latest(file: Path) -> dict[str, dict[str, Any]]:
    """The last event of progress of each expert."""
    try:
        with file.open("rb") as told:
            told.seek(max(0, told.seek(0, os.SEEK_END) - TAIL))
            lines = told.read().split(b"\n")
    except FileNotFoundError:
        return {}
    found = {}
    for line in lines[:-1]:
        try:
            facts = json.loads(line)
        except ValueError:  # the first, cut by the seek
            continue
        if facts.pop("event") == "progress":
            found[facts["expert"]] = facts
    return found


async def watch(service: Service) -> None:
    """While the server runs: have what jobs made or replaced served once they are done.

    Jobs of the command line count too, if they are in this database.
    """
    open_before: set[str] = set()
    while not service.live.is_ending:
        try:
            jobs = await asyncio.to_thread(_open_jobs, service)
            for id in open_before - jobs:
                await asyncio.to_thread(take_up, service, id)
            open_before = jobs
        except StoreError:  # told to whoever asks; the database may be back later
            pass
        await asyncio.sleep(WATCH_S)


def _open_jobs(service: Service) -> set[str]:
    store = service.kept
    found = (seen(store, job) for job in store.jobs.list(*OPEN))
    return {job.id for job in found if job.state in OPEN}


def take_up(service: Service, id: str) -> None:
    """The experts of a job that is done, read anew at their next use, and the router fitted to."""
    try:
        job = service.kept.jobs.get(id)
    except NoRecord:
        return
    if job.state == "done":
        for name in job.settings.get("experts", job.name.split(", ")):
            service.lm.engine.forget(name)
        try:
            service.reload_router()
        except LoramixError as error:  # the one that is served stays
            log.error("job", extra={"facts": {"job": id, "error": str(error)}})


def _seen(service: Service, job: Job) -> Job:
    return seen(service.kept, service.kept.jobs.get(job.id))


def _read(job: Job, place: int) -> list[Event]:
    return list(read_events(Path(job.folder) / EVENTS, place))


def _event(id: str, kind: str, facts: Mapping[str, Any]) -> bytes:
    data = json.dumps(facts, separators=(",", ":"))
    return f"id: {id}\nevent: {kind}\ndata: {data}\n\n".encode()
