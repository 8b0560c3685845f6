"""API keys. A secret is shown once, when it is made; the database knows its hash."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from loramix.errors import BadRequest, NoRecord
from loramix.store import tables
from loramix.store.database import Database
from loramix.store.records import Key, Role

PREFIX = "lmx"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_SECRET = re.compile(rf"{PREFIX}-[0-9a-f]{{16}}-[A-Za-z0-9_-]{{43}}")


class Keys:
    """The keys of a database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(
        self,
        name: str,
        *,
        role: Role = "user",
        adapters: Iterable[str] | None = None,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
    ) -> tuple[Key, str]:
        """A new key and its secret, `lmx-<id>-<256 random bits>`, which cannot be had again."""
        secret = new_secret()
        key = _made(secret, name, role, adapters, requests_per_minute, tokens_per_minute)
        try:
            with self._database.writing() as connection:
                connection.execute(sa.insert(tables.keys).values(_row(key, secret)))
        except IntegrityError:
            raise BadRequest(
                f"There is a key {name!r} already; choose another name, or remove it first."
            ) from None
        return key, secret

    def put(
        self,
        name: str,
        secret: str,
        *,
        role: Role = "user",
        adapters: Iterable[str] | None = None,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
    ) -> Key:
        """A key of a secret that there is already; it replaces the one of its name."""
        key = _made(secret, name, role, adapters, requests_per_minute, tokens_per_minute)
        other = (tables.keys.c.id == key.id) | (tables.keys.c.name == name)
        # Where it fails, a server beside this one has just done the same.
        with contextlib.suppress(IntegrityError), self._database.writing() as connection:
            connection.execute(sa.delete(tables.keys).where(other))
            connection.execute(sa.insert(tables.keys).values(_row(key, secret)))
        return key

    def list(self) -> list[Key]:
        with self._database.reading() as connection:
            rows = connection.execute(sa.select(tables.keys).order_by(tables.keys.c.created))
            return [_key(row) for row in rows]

    def remove(self, name: str) -> None:
        """From the next request on, its secret opens nothing."""
        with self._database.writing() as connection:
            done = connection.execute(sa.delete(tables.keys).where(tables.keys.c.name == name))
        if not done.rowcount:
            raise NoRecord(f"There is no key {name[:80]!r}; `loramix keys list` names them.")

    def find(self, secret: str) -> Key | None:
        """The key of a secret; the time it takes says nothing of the hash."""
        if not is_secret(secret):
            return None
        with self._database.reading() as connection:
            query = sa.select(tables.keys).where(tables.keys.c.id == _id(secret))
            row = connection.execute(query).first()
        known = row.hash if row else "0" * 64
        return _key(row) if hmac.compare_digest(known, _hash(secret)) and row else None

    def is_empty(self) -> bool:
        """Whether nobody has been given a key yet."""
        with self._database.reading() as connection:
            return connection.execute(sa.select(tables.keys.c.id).limit(1)).first() is None


def new_secret() -> str:
    return f"{PREFIX}-{secrets.token_hex(8)}-{secrets.token_urlsafe(32)}"


def is_secret(text: str) -> bool:
    """Whether it could be one of ours, which nobody guesses."""
    return bool(_SECRET.fullmatch(text))


def _id(secret: str) -> str:
    return secret.split("-")[1]


def _made(
    secret: str,
    name: str,
    role: Role,
    adapters: Iterable[str] | None,
    requests: int | None,
    tokens: int | None,
) -> Key:
    _check(name, role, requests, tokens)
    if not is_secret(secret):
        raise BadRequest("A secret is not of the form that `loramix keys secret` prints.")
    allowed = None if adapters is None else tuple(sorted(set(adapters)))
    return Key(_id(secret), name, role, allowed, requests, tokens, time.time())


def _row(key: Key, secret: str) -> dict[str, Any]:
    allowed = None if key.adapters is None else list(key.adapters)
    return asdict(key) | {"adapters": allowed, "hash": _hash(secret)}


def _hash(secret: str) -> str:
    """Of 256 random bits: nothing to guess, so nothing to slow down."""
    return hashlib.sha256(secret.encode()).hexdigest()


def _key(row: sa.Row[Any]) -> Key:
    return Key(
        id=row.id,
        name=row.name,
        role=row.role,
        adapters=None if row.adapters is None else tuple(row.adapters),
        requests_per_minute=row.requests_per_minute,
        tokens_per_minute=row.tokens_per_minute,
        created=row.created,
    )


def _check(name: str, role: str, requests: int | None, tokens: int | None) -> None:
    if not _NAME.fullmatch(name):
        raise BadRequest(
            f"name is {name[:80]!r}; expected at most 64 letters, digits and any of ._@- after "
            f"the first."
        )
    if role not in ("user", "admin"):
        raise BadRequest(f"role is {role!r}; expected user or admin.")
    for limit in (requests, tokens):
        if limit is not None and not 1 <= limit < 1 << 31:
            raise BadRequest(f"A limit is {limit}; expected at least 1 in a minute.")
