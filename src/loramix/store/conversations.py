"""Conversations and their turns. What is appended is committed whole or not at all."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from loramix.errors import Conflict, NoRecord
from loramix.store import tables
from loramix.store.database import Database
from loramix.store.records import Conversation, Turn

Owners = Sequence[str]
Place = tuple[
    float, str
]  # in a list: when a conversation changed, and its id, as times may be equal
_HEADS, _TURNS = tables.conversations, tables.turns


class Conversations:
    """The conversations of a database; `owners` are those whose conversations may be seen."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(self, owner: str, *, title: str = "", system: str = "") -> Conversation:
        now = time.time()
        made = Conversation(secrets.token_hex(16), owner, title, system, now, now)
        values = asdict(made)
        del values["turns"]
        with self._database.writing() as connection:
            connection.execute(sa.insert(_HEADS).values(values))
        return made

    def list(
        self, owners: Owners, *, limit: int = 100, before: Place | None = None
    ) -> list[Conversation]:
        """Without their turns, the last changed first; `before` continues after that place."""
        query = sa.select(_HEADS).where(_HEADS.c.owner.in_(owners))
        if before is not None:
            query = query.where(sa.tuple_(_HEADS.c.changed, _HEADS.c.id) < before)
        query = query.order_by(_HEADS.c.changed.desc(), _HEADS.c.id.desc()).limit(limit)
        with self._database.reading() as connection:
            return [Conversation(**row._mapping) for row in connection.execute(query)]

    def get(self, id: str, owners: Owners) -> Conversation:
        """NoRecord also for a conversation of somebody else."""
        with self._database.reading() as connection:
            return _whole(connection, id, owners)

    def change(
        self, id: str, owners: Owners, *, title: str | None = None, system: str | None = None
    ) -> Conversation:
        """What is None stays."""
        said = {"title": title, "system": system, "changed": time.time()}
        values = {name: value for name, value in said.items() if value is not None}
        with self._database.writing() as connection:
            connection.execute(sa.update(_HEADS).where(_own(id, owners)).values(values))
            return _whole(connection, id, owners)

    def delete(self, id: str, owners: Owners) -> None:
        with self._database.writing() as connection:
            if not connection.execute(sa.delete(_HEADS).where(_own(id, owners))).rowcount:
                raise _missing(id)

    def append(self, id: str, turns: Sequence[Turn]) -> tuple[Turn, ...]:
        """Add turns that have their numbers and versions, together.

        Conflict if there are such turns already, because somebody else was faster; NoRecord if
        the conversation was deleted meanwhile.
        """
        now = time.time()
        dated = tuple(replace(turn, created=turn.created or now) for turn in turns)
        rows = [asdict(turn) | {"conversation": id} for turn in dated]
        try:
            with self._database.writing() as connection:
                changed = sa.update(_HEADS).where(_HEADS.c.id == id).values(changed=now)
                if not connection.execute(changed).rowcount:
                    raise _missing(id)
                connection.execute(sa.insert(_TURNS), rows)
        except IntegrityError:
            raise Conflict(
                f"The conversation {id} went on meanwhile; read it again, then answer."
            ) from None
        return dated


def _whole(connection: sa.Connection, id: str, owners: Owners) -> Conversation:
    head = connection.execute(sa.select(_HEADS).where(_own(id, owners))).first()
    if head is None:
        raise _missing(id)
    query = sa.select(_TURNS).where(_TURNS.c.conversation == id)
    rows = connection.execute(query.order_by(_TURNS.c.number, _TURNS.c.version))
    return Conversation(**head._mapping, turns=tuple(_turn(row) for row in rows))


def _own(id: str, owners: Owners) -> Any:
    return (_HEADS.c.id == id) & _HEADS.c.owner.in_(owners)


def _turn(row: sa.Row[Any]) -> Turn:
    values = dict(row._mapping)
    del values["conversation"]
    return Turn(**values | {"reasons": tuple(values["reasons"])})


def _missing(id: str) -> NoRecord:
    return NoRecord(f"There is no conversation {id[:80]!r} of this key.")
