"""The connection: SQLite with a write-ahead log, or PostgreSQL; transactions; migrations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError, IntegrityError, SQLAlchemyError

from loramix.errors import StoreError

MIGRATIONS = Path(__file__).with_name("migrations")
BUSY_S = 10  # how long one writer waits for another
_MIGRATING = Lock()  # alembic knows one migration at a time in a process
_LOCK = 0x10A311  # of PostgreSQL's advisory locks: one process migrates at a time
_DRIVERS = {"postgres": "postgresql+psycopg", "postgresql": "postgresql+psycopg"}


class Database:
    """Transactions of one database, from any thread. StoreError if it cannot be reached."""

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
        if self.is_shared:
            return sa.create_engine(
                self._url, pool_pre_ping=True, connect_args={"connect_timeout": BUSY_S}
            )
        Path(str(self._url.database)).parent.mkdir(parents=True, exist_ok=True)
        engine = sa.create_engine(
            self._url, connect_args={"timeout": BUSY_S, "isolation_level": None}
        )
        sa.event.listen(engine, "connect", _set_up)
        sa.event.listen(engine, "begin", _begin)
        return engine

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except IntegrityError:  # what it means, its caller knows
            raise
        except SQLAlchemyError as error:
            cause = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
            raise StoreError(
                f"The database {self} cannot be used: {cause}; see that it is there, takes writes "
                f"and has room, then try again."
            ) from error


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


def _set_up(connection: Any, _: object) -> None:
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
