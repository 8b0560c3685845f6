"""The process is killed, the disk is full, the database goes away and comes back."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sqlalchemy as sa

from loramix.errors import DatabaseFull, StoreError
from loramix.store import Store
from loramix.store.records import Turn

_WRITER = """
import sys
from loramix.store import Store
from loramix.store.records import Turn
store = Store.open(sys.argv[1])
made = store.conversations.create("", title=sys.argv[2])
print("ready", flush=True)
for n in range(0, 1 << 30, 2):
    pair = [Turn("user", "q" * 2000, n), Turn("assistant", "a" * 2000, n + 1, finish="stop")]
    store.conversations.append(made.id, pair)
    print(n + 2, flush=True)
"""


def _killed_under_writes(url, round):
    """How many turns the writer was told are committed before it was killed."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    command = [sys.executable, "-c", _WRITER, url, str(round)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as writer:
        for _ in range(4):
            writer.stdout.readline()
        time.sleep(0.013 * (round % 7))
        writer.send_signal(signal.SIGKILL)
        said = writer.stdout.read().split()
    return int(said[-1]) if said else 6


@pytest.mark.parametrize("rounds", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_kill_9_under_writes_loses_nothing_and_leaves_nothing_half(url, rounds):
    for round in range(rounds):
        num_said = _killed_under_writes(url, round)
        with Store.open(url) as store:
            [last] = (c for c in store.conversations.list([""]) if c.title == str(round))
            turns = store.conversations.get(last.id, [""]).turns
        assert len(turns) % 2 == 0
        assert num_said <= len(turns) <= num_said + 2
        assert [turn.number for turn in turns] == list(range(len(turns)))


def test_a_full_disk_is_said_and_what_was_there_stays(store, url):
    if store.is_shared:
        pytest.skip("SQLite's own limit stands for the disk")
    made = store.conversations.create("")
    with store._database.reading() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
    store.close()
    _limited(store, pages + 2)
    with pytest.raises(DatabaseFull, match=r"has no room: .* full; make some"):
        store.conversations.append(made.id, [Turn("user", "x" * 100_000)])
    assert store.conversations.get(made.id, [""]).turns == ()
    store.close()
    _limited(store, 1 << 30)
    store.conversations.append(made.id, [Turn("user", "x" * 100_000)])


def _limited(store, pages):
    def limit(connection, _):
        connection.execute(f"PRAGMA max_page_count={pages}").close()

    sa.event.listen(store._database._engine, "connect", limit)


def test_a_file_that_is_gone_is_said_and_back_it_serves_again(tmp_path):
    file, aside = tmp_path / "x.db", tmp_path / "aside.db"
    with Store.open(f"sqlite:///{file}") as store:
        made = store.conversations.create("", title="kept")
        file.rename(aside)
        for ask in (store.keys.is_empty, lambda: store.conversations.create("")):
            with pytest.raises(StoreError, match="cannot be used"):
                ask()
        assert not file.exists()  # none is made in its place
        aside.rename(file)
        assert store.conversations.get(made.id, [""]) == made
    with Store.open(f"sqlite:///{file}") as store:  # and nothing went to another place
        assert store.conversations.list([""]) == [made]


def test_a_file_that_was_put_back_from_a_copy_is_the_one_that_counts(tmp_path):
    file, copy = tmp_path / "x.db", tmp_path / "copy.db"
    with Store.open(f"sqlite:///{file}") as store:
        early = store.conversations.create("")
    shutil.copy(file, copy)
    with Store.open(f"sqlite:///{file}") as store:
        store.conversations.create("")
        store._database._engine.dispose()  # the log is in the file now
        store.keys.is_empty()
        copy.replace(file)
        later = store.conversations.create("")
        assert {c.id for c in store.conversations.list([""])} == {early.id, later.id}
    with Store.open(f"sqlite:///{file}") as store:
        assert {c.id for c in store.conversations.list([""])} == {early.id, later.id}


def test_a_locked_database_is_said(store, monkeypatch):
    if store.is_shared:
        pytest.skip("PostgreSQL locks rows")
    store.close()
    sa.event.listen(
        store._database._engine, "connect", lambda c, _: c.execute("PRAGMA busy_timeout=50")
    )
    with sqlite3.connect(store._database._url.database, isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match="locked"):
            store.conversations.create("")
        assert store.conversations.list([""]) == []  # reading goes on
        other.execute("ROLLBACK")
    other.close()
    store.conversations.create("")


@pytest.mark.slow
def test_postgresql_gone_and_back(cluster):
    with cluster.fresh() as url, Store.open(url) as store:
        made = store.conversations.create("")
        cluster.stop()
        with pytest.raises(StoreError, match="cannot be used"):
            store.conversations.create("")
        cluster.start()
        assert store.conversations.get(made.id, [""]) == made
