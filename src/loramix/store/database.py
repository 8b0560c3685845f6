"""The connection: SQLite with a write-ahead log, or PostgreSQL; transactions; migrations."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import (
    ArgumentError,
    DataError,
    IntegrityError,
    InvalidatePoolError,
    SQLAlchemyError,
)

from loramix.errors import DatabaseFull, StoreError, Unstorable

MIGRATIONS = Path(__file__).with_name("migrations")
BUSY_S = 10  # how long one writer waits for another
_MIGRATING = Lock()  # alembic knows one migration at a time in a process
_LOCK = 0x10A311  # of PostgreSQL's advisory locks: one process migrates at a time
FULL = {sqlite3.SQLITE_FULL, "53100"}  # what SQLite and PostgreSQL call a disk without room
_DRIVERS = {"postgres": "postgresql+psycopg", "postgresql": "postgresql+psycopg"}


class Database:
    """Transactions of one database, from any thread.

    StoreError if it cannot be reached, Unstorable for a value that it cannot hold: half a
    character, a NaN, and on PostgreSQL a NUL.
    """

    def __init__(self, url: str) -> None:
        self._url = _read(url)
        self.is_shared = self._url.get_backend_name() == "postgresql"
        self._engine = self._connect()

    def __str__(self) -> str:
        return self._url.render_as_string(hide_password=True)

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        with self._told(), self._engine.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        """A transaction: all of it is committed at the end of the block, or nothing."""
        with self._told(), self._engine.connect() as connection:
            connection.execution_options(is_writing=True)
            with connection.begin():
                yield connection

    def migrate(self) -> None:
        """Bring the tables to this version's form; what is in them stays."""
        from alembic.runtime.environment import EnvironmentContext
        from alembic.script import ScriptDirectory
        from alembic.util import CommandError

        scripts = ScriptDirectory(str(MIGRATIONS), version_locations=[str(MIGRATIONS)])

        def upgrades(revision: Any, _: object) -> Any:
            return scripts._upgrade_revs("head", revision)

        try:
            with (
                _MIGRATING,
                self.writing() as connection,
                _environment(scripts, upgrades) as environment,
            ):
                if self.is_shared:
                    connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))
                assert isinstance(environment, EnvironmentContext)
                environment.configure(connection=connection)
                environment.run_migrations()
        except CommandError as error:
            raise StoreError(
                f"The database {self} was written by another version of loramix ({error}); "
                f"update loramix, or name another database."
            ) from error

    def close(self) -> None:
        self._engine.dispose()

    def _connect(self) -> sa.Engine:
        options: dict[str, Any] = {"json_serializer": partial(json.dumps, allow_nan=False)}
        if self.is_shared:
            waiting = {"connect_timeout": BUSY_S}
            return sa.create_engine(self._url, pool_pre_ping=True, connect_args=waiting, **options)
        file = Path(str(self._url.database)).absolute()
        self._make(file)
        engine = sa.create_engine(self._url, creator=partial(_opened, file), **options)
        sa.event.listen(engine, "connect", partial(_set_up, file))
        sa.event.listen(engine, "checkout", partial(_require_same, file))
        sa.event.listen(engine, "begin", _begin)
        return engine

    def _make(self, file: Path) -> None:
        """The file, if there is none yet: keys and chats in it are its owner's alone to read."""
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(file, os.O_RDWR | os.O_CREAT, 0o600))
        except OSError as error:
            raise StoreError(
                f"The database {self} cannot be opened: {error.strerror}; see that its folder "
                f"takes writes, or name another file."
            ) from error

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except IntegrityError:  # what it means, its caller knows
            raise
        except (SQLAlchemyError, ValueError) as error:  # the latter of a driver that takes no NaN
            raise self._meant(error) from error

    def _meant(self, error: Exception) -> StoreError:
        cause = getattr(error, "orig", None) or error
        said = (str(cause).strip().splitlines() or [type(cause).__name__])[0].rstrip(".")
        if isinstance(error, DataError) or isinstance(cause, ValueError):
            return Unstorable(f"The database cannot hold this: {said}; leave it out.")
        if FULL & {getattr(cause, "sqlite_errorcode", None), getattr(cause, "sqlstate", None)}:
            return DatabaseFull(
                f"The database {self} has no room: {said}; make some, then try again."
            )
        return StoreError(
            f"The database {self} cannot be used: {said}; see that it is there and takes writes, "
            f"then try again."
        )


def _read(url: str) -> sa.URL:
    try:
        read = sa.make_url(url)
    except ArgumentError:
        raise StoreError(
            f"{url[:80]!r} is no database; expected sqlite:///FILE or postgresql://HOST/NAME."
        ) from None
    read = read.set(drivername=_DRIVERS.get(read.drivername, read.drivername))
    if read.drivername == "postgresql+psycopg":
        _require_psycopg()
    elif read.drivername != "sqlite" or read.database in (None, "", ":memory:"):
        raise StoreError(
            f"{read.render_as_string()!r} cannot be used; expected sqlite:///FILE or "
            f"postgresql://HOST/NAME."
        )
    return read


def _require_psycopg() -> None:
    try:
        import psycopg  # noqa: F401
    except ImportError:
        raise StoreError(
            "PostgreSQL needs psycopg; install it with `pip install 'loramix[postgres]'`."
        ) from None


def _opened(file: Path) -> sqlite3.Connection:
    """A connection to a file that is there: SQLite would make an empty one in its place."""
    return sqlite3.connect(
        f"{file.as_uri()}?mode=rw",
        uri=True,
        timeout=BUSY_S,
        isolation_level=None,
        check_same_thread=False,  # the pool gives it to one thread at a time
    )


def _require_same(file: Path, _: object, record: Any, __: object) -> None:
    """Drop connections to a file that was moved or replaced: what they write nobody would find."""
    if record.info["file"] != _identity(file):
        raise InvalidatePoolError(f"{file} is not the file that was opened")


def _identity(file: Path) -> tuple[int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _set_up(file: Path, connection: sqlite3.Connection, record: Any) -> None:
    record.info["file"] = _identity(file)
    for setting in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {setting}")


def _begin(connection: sa.Connection) -> None:
    """Writers wait at the beginning: one that read first could not become a writer later."""
    is_writing = connection.get_execution_options().get("is_writing")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if is_writing else "BEGIN")


def _environment(scripts: Any, upgrades: Any) -> Any:
    from alembic.config import Config
    from alembic.runtime.environment import EnvironmentContext

    return EnvironmentContext(Config(), scripts, fn=upgrades)
