"""Every test of the store on SQLite; run with -m slow, on a real PostgreSQL too."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import sqlalchemy as sa

from loramix.store import Store

_HERE = "-c listen_addresses='' -c unix_socket_directories={folder} -c fsync=off"


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Of an empty database."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/loramix.db"
        return
    cluster: Cluster = request.getfixturevalue("cluster")
    with cluster.fresh() as url:
        yield url


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    with Store.open(url) as store:
        yield store


class Cluster:
    """A PostgreSQL of our own in a folder; only its socket can be reached."""

    def __init__(self, folder: Path, run: Callable[..., None]) -> None:
        self._folder = folder
        self._run = run
        self._num_databases = 0

    def start(self) -> None:
        options = _HERE.format(folder=self._folder)
        log = self._folder / "log"
        self._run("pg_ctl", "-w", "-D", self._folder / "data", "-o", options, "-l", log, "start")

    def stop(self) -> None:
        self._run("pg_ctl", "-w", "-m", "immediate", "-D", self._folder / "data", "stop")

    def url(self, name: str) -> str:
        return f"postgresql://postgres@/{name}?host={self._folder}"

    @contextmanager
    def fresh(self) -> Iterator[str]:
        """The URL of an empty database, gone afterwards."""
        self._num_databases += 1
        name = f"test{self._num_databases}"
        self._ask(f"CREATE DATABASE {name}")
        yield self.url(name)
        self._ask(f"DROP DATABASE {name} WITH (FORCE)")

    def _ask(self, statement: str) -> None:
        url = self.url("postgres").replace("postgresql:", "postgresql+psycopg:")
        engine = sa.create_engine(url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
        with engine.connect() as connection:
            connection.exec_driver_sql(statement)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Started from Debian's packages; root hands it to the user postgres, as it must."""
    places = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not places:
        pytest.skip("no PostgreSQL (apt-get install postgresql)")
    folder = Path(tempfile.mkdtemp(prefix="loramix-pg-", dir="/tmp"))
    user = "postgres" if os.getuid() == 0 else pwd.getpwuid(os.getuid()).pw_name
    if os.getuid() == 0:
        shutil.chown(folder, user)

    def run(program: str, *words: object) -> None:
        command = [str(places[-1] / program), *map(str, words)]
        subprocess.run(
            command, check=True, user=user if os.getuid() == 0 else None, cwd=folder,
            stdout=subprocess.DEVNULL, env={"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"},
        )  # fmt: skip

    made = Cluster(folder, run)
    try:
        run("initdb", "-D", folder / "data", "-U", "postgres", "-A", "trust", "-E", "UTF8")
        made.start()
        yield made
        made.stop()
    finally:
        shutil.rmtree(folder)
