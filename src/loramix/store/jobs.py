"""Jobs: work of hours, and how it ended."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import sqlalchemy as sa

from loramix.errors import NoRecord
from loramix.store import tables
from loramix.store.database import Database
from loramix.store.records import Job, State

_JOBS = tables.jobs
_OVER = ("done", "failed", "stopped")


class Jobs:
    """The jobs of a database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(self, kind: str, name: str, settings: Mapping[str, Any], folder: str) -> Job:
        """A job that waits for its turn."""
        job = Job(
            id=secrets.token_hex(16),
            kind=kind,
            name=name,
            state="queued",
            settings=dict(settings),
            folder=folder,
            pid=None,
            created=time.time(),
            started=None,
            ended=None,
            error="",
        )
        with self._database.writing() as connection:
            connection.execute(sa.insert(_JOBS).values(asdict(job)))
        return job

    def get(self, id: str) -> Job:
        with self._database.reading() as connection:
            row = connection.execute(sa.select(_JOBS).where(_JOBS.c.id == id)).first()
        if row is None:
            raise NoRecord(f"There is no job {id[:80]!r}.")
        return Job(**row._mapping)

    def list(self, *states: State) -> list[Job]:
        """All, or those in these states, in the order they were made."""
        query = sa.select(_JOBS).order_by(_JOBS.c.created, _JOBS.c.id)
        if states:
            query = query.where(_JOBS.c.state.in_(states))
        with self._database.reading() as connection:
            return [Job(**row._mapping) for row in connection.execute(query)]

    def start(self, id: str, pid: int) -> bool:
        """Whether it was still queued: of several that try, one starts it."""
        values = {"state": "running", "pid": pid, "started": time.time()}
        return self._set(id, ("queued",), values)

    def end(self, id: str, state: State, error: str = "") -> bool:
        """Whether it was not over yet; a job that is over stays as it is."""
        if state not in _OVER:
            raise ValueError(f"{state} is no end of a job")
        values = {"state": state, "error": error, "ended": time.time(), "pid": None}
        return self._set(id, ("queued", "running"), values)

    def requeue(self, id: str) -> bool:
        """Let a job that is over run again, with the same settings in the same folder."""
        values = {"state": "queued", "error": "", "started": None, "ended": None}
        return self._set(id, _OVER, values)

    def delete(self, id: str) -> None:
        """Forget it; its folder is its maker's to remove."""
        with self._database.writing() as connection:
            if not connection.execute(sa.delete(_JOBS).where(_JOBS.c.id == id)).rowcount:
                raise NoRecord(f"There is no job {id[:80]!r}.")

    def _set(self, id: str, states: tuple[str, ...], values: Mapping[str, Any]) -> bool:
        change = sa.update(_JOBS).where(_JOBS.c.id == id, _JOBS.c.state.in_(states))
        with self._database.writing() as connection:
            return bool(connection.execute(change.values(dict(values))).rowcount)
