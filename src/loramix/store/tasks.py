"""Runs of workflows: what was asked, how far it is, what came of it."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import sqlalchemy as sa

from loramix.errors import NoRecord
from loramix.store import tables
from loramix.store.database import Database
from loramix.store.records import Status, Task

OPEN: tuple[Status, ...] = ("pending", "processing")
_TASKS = tables.tasks


class Tasks:
    """The tasks of a database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(
        self,
        owner: str,
        workflow: str,
        input: Mapping[str, Any],
        *,
        session: str = "",
        metadata: Mapping[str, Any] | None = None,
    ) -> Task:
        task = Task(
            id=secrets.token_hex(16),
            owner=owner,
            workflow=workflow,
            status="pending",
            input=dict(input),
            output=None,
            error="",
            session=session,
            metadata=dict(metadata or {}),
            created=time.time(),
            ended=None,
        )
        with self._database.writing() as connection:
            connection.execute(sa.insert(_TASKS).values(asdict(task)))
        return task

    def get(self, id: str, owners: Sequence[str]) -> Task:
        """NoRecord also for a task of somebody else."""
        query = sa.select(_TASKS).where(_TASKS.c.id == id, _TASKS.c.owner.in_(owners))
        with self._database.reading() as connection:
            row = connection.execute(query).first()
        if row is None:
            raise NoRecord(f"There is no task {id[:80]!r} of this key.")
        return Task(**row._mapping)

    def set(self, id: str, status: Status, *, output: Any = None, error: str = "") -> bool:
        """Whether it was still open; a task that is over stays as it is."""
        ended = None if status in OPEN else time.time()
        values = {"status": status, "output": output, "error": error, "ended": ended}
        change = sa.update(_TASKS).where(_TASKS.c.id == id, _TASKS.c.status.in_(OPEN))
        with self._database.writing() as connection:
            return bool(connection.execute(change.values(values)).rowcount)

    def delete(self, id: str, owners: Sequence[str]) -> None:
        """NoRecord also for a task of somebody else."""
        doomed = sa.delete(_TASKS).where(_TASKS.c.id == id, _TASKS.c.owner.in_(owners))
        with self._database.writing() as connection:
            if not connection.execute(doomed).rowcount:
                raise NoRecord(f"There is no task {id[:80]!r} of this key.")

    def expire(self, before: float) -> int:
        """Forget what was over before then."""
        with self._database.writing() as connection:
            return connection.execute(sa.delete(_TASKS).where(_TASKS.c.ended < before)).rowcount

    def abandon(self, before: float, reason: str) -> int:
        """Fail what was begun before then and is open still: the server that ran it has ended."""
        values = {"status": "failed", "error": reason, "ended": time.time()}
        change = sa.update(_TASKS).where(_TASKS.c.status.in_(OPEN), _TASKS.c.created < before)
        with self._database.writing() as connection:
            return connection.execute(change.values(values)).rowcount
