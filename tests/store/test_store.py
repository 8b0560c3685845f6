"""What is kept: keys, conversations, tasks, jobs; the same on every database."""

import threading
import time
from dataclasses import replace

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from loramix.errors import BadRequest, Conflict, NoRecord, StoreError, Unstorable
from loramix.store import Store, tables
from loramix.store.database import Database
from loramix.store.keys import new_secret
from loramix.store.records import Turn

NOBODY = ("",)


def asked(text="hi", number=0):
    return Turn("user", text, number)


def answered(text="ho", number=1, version=0, **more):
    return Turn("assistant", text, number, version, **more)


def test_the_migrations_make_the_tables_that_the_code_uses(url):
    with Store.open(url):
        engine = sa.create_engine(Database(url)._url, poolclass=sa.NullPool)
        with engine.connect() as connection:
            context = MigrationContext.configure(connection, opts={"compare_type": True})
            assert compare_metadata(context, tables.metadata) == []


def test_a_database_is_opened_again_and_by_many_at_once(url):
    with Store.open(url) as store:
        made = store.conversations.create("", title="kept")
    stores, errors = [], []

    def open_one():
        try:
            stores.append(Store.open(url))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=open_one) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for store in stores:
        assert store.conversations.get(made.id, NOBODY) == made
        store.close()


def test_a_newer_database_is_left_alone(url):
    with Store.open(url) as store, store._database.writing() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '999'")
    with pytest.raises(StoreError, match="another version of loramix"):
        Store.open(url)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("nonsense", "is no database"),
        ("sqlite://", "cannot be used"),
        ("sqlite:///:memory:", "cannot be used"),
        ("mysql://root@localhost/x", "cannot be used"),
        ("postgresql://x:secret@127.0.0.1:1/x", r"postgresql\+psycopg://x:\*\*\*@.* cannot be"),
    ],
)
def test_what_is_no_database_is_said_in_a_sentence(url, says):
    with pytest.raises(StoreError, match=says) as error:
        Store.open(url)
    assert "\n" not in str(error.value)
    assert "secret" not in str(error.value)


def test_a_file_that_is_no_database_is_refused(tmp_path):
    place = tmp_path / "x.db"
    place.write_text("not a database, whatever its name says" * 100)
    with pytest.raises(StoreError, match="not a database"):
        Store.open(f"sqlite:///{place}")


def test_only_the_secret_opens(store):
    key, secret = store.keys.add("ada", role="admin", adapters=["sql", "a"], tokens_per_minute=9)
    other, _ = store.keys.add("bob")
    assert store.keys.find(secret) == key
    assert (key.role, key.adapters, key.tokens_per_minute) == ("admin", ("a", "sql"), 9)
    assert (other.role, other.adapters, other.requests_per_minute) == ("user", None, None)
    wrong = secret[:-1] + ("A" if secret[-1] != "A" else "B")
    for no in (wrong, secret[:-1], secret + "A", secret.replace(key.id, other.id), "", "lmx-", "é"):
        assert store.keys.find(no) is None
    assert store.keys.list() == [key, other]


def test_a_secret_from_elsewhere_opens_and_replaces_the_key_of_its_name(store):
    one, two = new_secret(), new_secret()
    first = store.keys.put("ada", one, adapters=["sql"])
    assert store.keys.find(one) == first
    again = store.keys.put(
        "ada", one, role="admin", requests_per_minute=3
    )  # what it may has changed
    assert again.id == first.id
    assert store.keys.find(one) == again
    store.keys.put("ada", two)
    assert store.keys.find(one) is None
    assert [key.name for key in store.keys.list()] == ["ada"]
    store.keys.put("bob", two)  # another name for it
    assert store.keys.find(two).name == "bob"
    assert [key.name for key in store.keys.list()] == ["bob"]
    with pytest.raises(BadRequest, match="not of the form") as error:
        store.keys.put("eve", "guess-me")
    assert "guess-me" not in str(error.value)


def test_servers_that_begin_together_may_put_the_same_key(store):
    secret, errors = new_secret(), []

    def put():
        try:
            store.keys.put("ada", secret)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=put) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert store.keys.find(secret).name == "ada"


def test_no_secret_lies_in_the_database(store):
    _, secret = store.keys.add("ada")
    with store._database.reading() as connection:
        row = connection.execute(sa.select(tables.keys)).one()
    assert secret.split("-", 2)[2] not in repr(row)


def test_a_removed_key_opens_nothing(store):
    assert store.keys.is_empty()
    _, secret = store.keys.add("ada")
    assert not store.keys.is_empty()
    store.keys.remove("ada")
    assert store.keys.find(secret) is None
    with pytest.raises(NoRecord, match="no key 'ada'"):
        store.keys.remove("ada")


def test_an_empty_set_of_adapters_is_not_all_of_them(store):
    key, secret = store.keys.add("ada", adapters=[])
    assert store.keys.find(secret).adapters == key.adapters == ()


@pytest.mark.parametrize(
    "bad",
    [{"name": ""}, {"name": "a b"}, {"name": "x" * 65}, {"role": "root"},
     {"requests_per_minute": 0}, {"tokens_per_minute": -1}, {"tokens_per_minute": 1 << 40}],
)  # fmt: skip
def test_keys_that_cannot_be_are_refused(store, bad):
    with pytest.raises(BadRequest):
        store.keys.add(**({"name": "ada"} | bad))
    assert store.keys.is_empty()


def test_two_keys_do_not_share_a_name(store):
    first, _ = store.keys.add("ada")
    with pytest.raises(BadRequest, match="already"):
        store.keys.add("ada")
    assert store.keys.list() == [first]


def test_a_conversation_comes_back_as_it_went_in(store):
    made = store.conversations.create("k", title="Größe 😀", system="Be brief.\n")
    answer = answered(
        "ja 😀\n", mix="a:0.5+b:0.5", scores={"a": 0.75, "b": 0.25}, none=0.125, ms=1.5, trace="t",
        reasons=("one", "two"), prompt_tokens=3, completion_tokens=4, finish="stop",
    )  # fmt: skip
    turns = store.conversations.append(made.id, [asked("ähm"), answer])
    found = store.conversations.get(made.id, ["k"])
    assert found.turns == turns
    assert turns[1] == replace(answer, created=turns[1].created)
    assert (found.title, found.system) == ("Größe 😀", "Be brief.\n")
    assert found.changed >= found.created == made.created


def test_an_answer_given_again_is_the_conversations(store):
    made = store.conversations.create("")
    store.conversations.append(made.id, [asked(), answered("first")])
    store.conversations.append(made.id, [answered("second", version=1)])
    found = store.conversations.get(made.id, NOBODY)
    assert [turn.content for turn in found.turns] == ["hi", "first", "second"]
    assert [turn.content for turn in found.current] == ["hi", "second"]


def test_of_two_who_append_the_same_place_one_is_told(store):
    made = store.conversations.create("")
    store.conversations.append(made.id, [asked(), answered()])
    with pytest.raises(Conflict, match="went on meanwhile"):
        store.conversations.append(made.id, [asked("new", 2), answered("again")])
    assert len(store.conversations.get(made.id, NOBODY).turns) == 2  # not three: whole or not


def test_conversations_are_their_owners(store):
    mine = store.conversations.create("me")
    for forbidden in (store.conversations.get, store.conversations.delete):
        with pytest.raises(NoRecord, match="no conversation"):
            forbidden(mine.id, ["you"])
    with pytest.raises(NoRecord):
        store.conversations.change(mine.id, ["you"], title="yours")
    assert store.conversations.list(["you"]) == []
    assert store.conversations.get(mine.id, ["me", ""]) == mine


def test_lists_begin_with_the_last_changed_and_go_on(store):
    made = [store.conversations.create("") for _ in range(5)]
    store.conversations.change(made[0].id, NOBODY, title="new")
    listed = store.conversations.list(NOBODY, limit=2)
    assert [c.id for c in listed] == [made[0].id, made[4].id]
    rest = store.conversations.list(NOBODY, before=(listed[-1].changed, listed[-1].id))
    assert [c.id for c in rest] == [made[3].id, made[2].id, made[1].id]


def test_conversations_of_one_moment_are_all_listed_once(store, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1000.5)
    made = {store.conversations.create("").id for _ in range(7)}
    found, place = [], None
    while part := store.conversations.list(NOBODY, limit=2, before=place):
        found += [each.id for each in part]
        place = part[-1].changed, part[-1].id
    assert len(found) == 7
    assert set(found) == made


@pytest.mark.parametrize(
    "turn", [asked("a\ud800b"), answered(scores={"sql": float("nan")}), answered("x", mix="\udcff")]
)
def test_what_no_database_holds_is_a_bad_request_and_nothing_is_kept(store, turn):
    made = store.conversations.create("")
    with pytest.raises(Unstorable, match="cannot hold this") as error:
        store.conversations.append(made.id, [turn])
    assert (error.value.status, "\n" in str(error.value)) == (400, False)
    assert store.conversations.get(made.id, NOBODY) == made
    with pytest.raises(NoRecord if not store.is_shared else Unstorable):
        store.conversations.get("a\0b", NOBODY)
    with pytest.raises(Unstorable):
        store.tasks.get("\ud800", NOBODY)


def test_a_deleted_conversation_takes_its_turns_along(store):
    made = store.conversations.create("")
    store.conversations.append(made.id, [asked(), answered()])
    store.conversations.delete(made.id, NOBODY)
    with store._database.reading() as connection:
        assert connection.execute(sa.select(tables.turns)).all() == []
    with pytest.raises(NoRecord):
        store.conversations.append(made.id, [asked(), answered()])


def test_many_threads_write_at_once(store):
    made = [store.conversations.create("") for _ in range(4)]
    errors = []

    def write(conversation):
        try:
            for n in range(15):
                pair = [asked(str(n), 2 * n), answered(str(n), 2 * n + 1)]
                store.conversations.append(conversation.id, pair)
                store.conversations.get(conversation.id, NOBODY)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(c,)) for c in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert [len(store.conversations.get(c.id, NOBODY).turns) for c in made] == [30] * 4


def test_a_task_ends_once(store):
    task = store.tasks.create("me", "chat", {"prompt": "hi"}, session="s", metadata={"x": [1]})
    assert store.tasks.get(task.id, ["me"]) == task
    assert not task.is_over
    assert store.tasks.set(task.id, "processing")
    assert store.tasks.set(task.id, "completed", output={"text": "ho"})
    assert not store.tasks.set(task.id, "cancelled")
    done = store.tasks.get(task.id, ["me"])
    assert (done.status, done.output, done.is_over) == ("completed", {"text": "ho"}, True)
    assert done.ended >= done.created
    with pytest.raises(NoRecord, match="no task"):
        store.tasks.get(task.id, ["you"])


def test_tasks_of_a_server_that_ended_fail(store):
    old, over = (store.tasks.create("", "chat", {}) for _ in range(2))
    store.tasks.set(over.id, "completed", output=None)
    now = time.time()
    new = store.tasks.create("", "chat", {})
    assert store.tasks.abandon(now, "The server ended.") == 1
    found = [store.tasks.get(task.id, NOBODY) for task in (old, over, new)]
    assert [task.status for task in found] == ["failed", "completed", "pending"]
    assert found[0].error == "The server ended."


def test_a_task_is_forgotten_by_its_owner_or_with_time(store):
    mine, old, open_ = (store.tasks.create("me", "chat", {}) for _ in range(3))
    for task in (mine, old):
        store.tasks.set(task.id, "cancelled")
    with pytest.raises(NoRecord):
        store.tasks.delete(mine.id, ["you"])
    store.tasks.delete(mine.id, ["me"])
    with pytest.raises(NoRecord):
        store.tasks.get(mine.id, ["me"])
    assert store.tasks.expire(store.tasks.get(old.id, ["me"]).ended) == 0
    assert store.tasks.expire(time.time() + 1) == 1
    assert store.tasks.get(open_.id, ["me"]) == open_


def test_a_job_is_started_by_one_and_ends_once(store):
    job = store.jobs.create("train", "sql", {"epochs": 3}, "/runs/1")
    other = store.jobs.create("train", "math", {}, "/runs/2")
    assert store.jobs.list("queued") == store.jobs.list() == [job, other]
    assert (store.jobs.start(job.id, 7), store.jobs.start(job.id, 8)) == (True, False)
    assert (store.jobs.get(job.id).pid, store.jobs.get(job.id).state) == (7, "running")
    assert store.jobs.end(job.id, "failed", "no memory")
    assert not store.jobs.end(job.id, "done")
    ended = store.jobs.get(job.id)
    assert (ended.state, ended.error, ended.pid) == ("failed", "no memory", None)
    assert ended.ended >= ended.started >= ended.created
    assert store.jobs.requeue(job.id)
    assert store.jobs.get(job.id) == job
    store.jobs.delete(job.id)
    with pytest.raises(NoRecord, match="no job"):
        store.jobs.get(job.id)
    assert store.jobs.list("running", "done") == []


def test_a_file_is_its_owners_alone_and_one_that_is_there_stays_as_it_is(tmp_path):
    new, old = tmp_path / "new.db", tmp_path / "old.db"
    old.touch(0o644)
    for place in (new, old):
        with Store.open(f"sqlite:///{place}") as store:
            store.keys.add("ada")
            modes = {file.stat().st_mode & 0o777 for file in tmp_path.glob(f"{place.name}*")}
            assert modes == {0o600 if place == new else 0o644}  # the log beside it, too


@pytest.mark.parametrize("place", ["file/x.db", "folder"])
def test_where_nothing_can_be_written_is_said_in_a_sentence(tmp_path, place):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(StoreError, match=r"cannot be opened: .* name another file") as error:
        Store.open(f"sqlite:///{tmp_path / place}")
    assert "\n" not in str(error.value)


def test_a_store_is_named_without_its_password(tmp_path):
    with Store.open(f"sqlite:///{tmp_path}/deep/in/x.db") as store:
        assert str(store) == f"sqlite:///{tmp_path}/deep/in/x.db"
        assert not store.is_shared
