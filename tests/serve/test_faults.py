"""Kills, a full disk, a database that goes away: what was told is kept, and the service goes on."""

import contextlib
import itertools
import json
import sqlite3
import threading
import time

import httpx
import pytest
import sqlalchemy as sa

from loramix.errors import StoreError
from loramix.store.records import Turn
from tests.serve.front import served, wait_for

SHORT = {"model": "base", "temperature": 0, "max_tokens": 6}


class Talk(threading.Thread):
    """A client in one conversation after another until its server is gone."""

    def __init__(self, url, mix):
        super().__init__()
        self.url, self.mix = url, mix
        self.kept = {}  # by conversation, the turns that it was told are kept

    def run(self):
        try:
            with httpx.Client(base_url=self.url, timeout=60) as http:
                while True:
                    self.converse(http)
        except httpx.TransportError:
            return

    def converse(self, http):
        id = http.post("/v1/conversations", json={}).json()["id"]
        self.kept[id] = []
        run = {"workflow_id": self.mix, "input": {"prompt": "hi"}, "wait_for_completion": False}
        http.post("/api/workflows/runs", json=run)
        for stream in (True, False):
            asked = SHORT | {"model": self.mix, "content": "hi", "stream": stream}
            got = http.post(f"/v1/conversations/{id}/turns", json=asked).text
            events = [line.removeprefix("data: ") for line in got.split("\n\n")]
            told = next(event for event in events if "conversation.turns" in event)
            self.kept[id] += json.loads(told)["turns"]


def check(url, kept):
    """Everything that was told is there, and nothing is half."""
    with httpx.Client(base_url=url, timeout=60) as http:
        listed = http.get("/v1/conversations?limit=1000").json()["data"]
        turns = {c["id"]: http.get(f"/v1/conversations/{c['id']}").json()["turns"] for c in listed}
    for each in turns.values():
        assert len(each) % 2 == 0
        assert [turn["number"] for turn in each] == list(range(len(each)))
        assert all(turn["finish"] for turn in each[1::2])
    assert kept.keys() <= turns.keys()
    for id, told in kept.items():
        assert turns[id][: len(told)] == told


def whole(database):
    """What SQLite itself says, and that no task waits for a server that is gone."""
    connection = sqlite3.connect(database)
    [(said,)] = connection.execute("PRAGMA integrity_check")
    [(open_tasks,)] = connection.execute(
        "SELECT count(*) FROM tasks WHERE status IN ('pending', 'processing')"
    )
    connection.close()
    return said == "ok", open_tasks


def killed_under_load(words, told, delay_s):
    """Check what there is, and kill the server while eight talk to it; what they were told."""
    with served(*words) as (process, url):
        check(url, told)
        talks = [Talk(url, f"banking:{n / 8}") for n in range(1, 9)]
        for talk in talks:
            talk.start()
        wait_for(lambda: sum(len(told) for talk in talks for told in talk.kept.values()) >= 8)
        time.sleep(delay_s)
        process.kill()
        process.wait()
        for talk in talks:
            talk.join()
    return dict(itertools.chain(*(talk.kept.items() for talk in talks)))


@pytest.mark.parametrize("rounds", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_kill_9_under_load_loses_nothing_that_was_told(shop, tmp_path, rounds):
    database = tmp_path / "loramix.db"
    words = [*shop.flags, "--set", f"database={json.dumps(f'sqlite:///{database}')}"]
    told = {}
    for round in range(rounds):
        told |= killed_under_load(words, told, delay_s=0.037 * (round % 7))
        assert whole(database)[0]
    with served(*words) as (_, url):
        check(url, told)
        assert whole(database) == (True, 0)


def say(keeping, place, **more):
    return keeping.http.post(f"{place}/turns", json=SHORT | {"content": "hi"} | more)


def limited(store, pages):
    """A database that can have no more pages stands for a full disk."""

    def limit(connection, _):
        connection.execute(f"PRAGMA max_page_count={pages}").close()

    store._database._engine.dispose()
    sa.event.listen(store._database._engine, "connect", limit)


def fill(store):
    with store._database.reading() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
    limited(store, pages + 2)
    other = store.conversations.create("").id
    with contextlib.suppress(StoreError):
        for number in range(10_000):
            store.conversations.append(other, [Turn("user", "", number)])


def test_a_full_disk_keeps_nothing_half_and_the_service_goes_on(keeping):
    place = f"/v1/conversations/{keeping.http.post('/v1/conversations', json={}).json()['id']}"
    assert say(keeping, place).is_success
    before = keeping.http.get(place).json()
    fill(keeping.service.store)
    for stream, status in ((False, 507), (True, 200)):  # a stream has begun by then
        got = say(keeping, place, stream=stream)
        assert (got.status_code, "disk is full; make some" in got.text) == (status, True)
        assert keeping.http.get(place).json() == before
        assert keeping.chat().is_success
    limited(keeping.service.store, 1 << 30)
    assert say(keeping, place).is_success
    assert len(keeping.http.get(place).json()["turns"]) == 4


def test_a_database_that_is_gone_is_a_503_and_back_it_goes_on(keeping, tmp_path):
    place = f"/v1/conversations/{keeping.http.post('/v1/conversations', json={}).json()['id']}"
    (tmp_path / "loramix.db").rename(tmp_path / "away.db")
    # No key can be looked up, so whatever is asked is refused.
    for got in (keeping.http.get(place), say(keeping, place), keeping.chat()):
        assert (got.status_code, got.headers["retry-after"]) == (503, "1")
        assert "loramix.db cannot be used" in got.json()["error"]["message"]
    assert keeping.http.get("/health").is_success
    (tmp_path / "away.db").rename(tmp_path / "loramix.db")
    assert say(keeping, place).is_success
    assert len(keeping.http.get(place).json()["turns"]) == 2
