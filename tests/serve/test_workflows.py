"""Workflows over HTTP: runs that are waited for, streamed or left alone, and whose they are."""

import asyncio
import contextlib
import json
import threading
import time

import httpx
import pytest

import loramix
from loramix.chat import Message
from loramix.engine import Request, Sampling
from loramix.errors import NoRecord
from loramix.mix import Mix
from loramix.serve.limits import Limits
from loramix.serve.runs import abandon, expire
from loramix.serve.service import Service
from tests.serve.front import running, wait_for
from tests.serve.keyed import client
from tests.shop import BANKING, SQL

GREEDY = {"temperature": 0, "max_tokens": 6}


@pytest.fixture
def slow(lm, monkeypatch):
    """Steps that take 50 ms."""
    forward = lm.engine._core.forward

    def slow(batch):
        time.sleep(0.05)
        return forward(batch)

    monkeypatch.setattr(lm.engine._core, "forward", slow)


def run(http, prompt=BANKING, workflow="banking", max_tokens=6, **more):
    given = {"prompt": prompt, "temperature": 0, "max_tokens": max_tokens}
    return http.post("/api/workflows/runs", json={"workflow_id": workflow, "input": given} | more)


def offline(lm, mix, *messages):
    turns = tuple(Message(role, text) for role, text in messages)
    sampling = Sampling(temperature=0, max_tokens=6)
    return lm.engine.generate([Request(turns, Mix.parse(mix), sampling)])[0].text


def status(keeping, id):
    return keeping.http.get(f"/api/tasks/{id}").json()["status"]


def busy(lm):
    return lm.engine.statistics().running


def streamed(response):
    return [line.removeprefix("data: ") for line in response.iter_lines() if line]


def test_workflows_are_the_base_the_router_the_adapters_and_the_default(keeping):
    def listed():
        found = keeping.http.get("/api/workflows").json()
        return [each["workflow_id"] for each in found], [
            each["workflow_id"] for each in found if each["default"]
        ]

    assert listed() == (["base", "auto", "banking", "sql"], ["auto"])
    keeping.service.live.default = "banking:0.5+sql:0.25"
    ids, default = listed()
    assert ids == ["base", "auto", "banking", "sql", *default]
    assert Mix.parse(default[0]) == Mix({"banking": 0.5, "sql": 0.25})
    for id in ids:
        found = keeping.http.get(f"/api/workflows/{id}/schema").json()
        assert found["workflow_id"] == id
        assert found["input"]["required"] == ["prompt"]
        assert "text" in found["output"]["properties"]
    assert keeping.http.get("/api/workflows/nobody/schema").status_code == 404


@pytest.mark.parametrize(
    ("workflow", "mix"),
    [("banking", "banking"), ("base", "base"), ("auto", "banking"), (None, "banking"),
     ("banking:0.5+sql:0.25", "banking:0.5+sql:0.25")],
)  # fmt: skip
def test_a_run_that_is_waited_for_has_its_output(keeping, lm, workflow, mix):
    got = run(keeping.http, workflow=workflow, metadata={"from": "test", "n": 1})
    task = got.json()
    assert (got.status_code, task["status"]) == (200, "completed"), got.text
    assert task["workflow_id"] == (workflow or "auto")
    assert task["output"]["text"] == offline(lm, mix, ("user", BANKING))
    assert task["output"]["loramix"]["mix"] == got.headers["x-loramix-mix"] == mix
    assert task["output"]["usage"]["prompt_tokens"] > 0
    assert task["metadata"] == {"from": "test", "n": 1}
    assert keeping.http.get(f"/api/tasks/{task['task_id']}").json() == task
    only = run(keeping.http, workflow=workflow, output_only=True).json()
    assert only["text"] == task["output"]["text"]


def test_a_run_that_is_not_waited_for_goes_on(keeping, lm):
    got = run(keeping.http, wait_for_completion=False)
    task = got.json()
    assert (got.status_code, task["status"], task["output"]) == (202, "pending", None)
    wait_for(lambda: status(keeping, task["task_id"]) == "completed")
    found = keeping.http.get(f"/api/tasks/{task['task_id']}").json()
    assert found["output"]["text"] == offline(lm, "banking", ("user", BANKING))
    assert found["ended"] > found["created"]


def test_a_stream_has_the_text_then_the_task(keeping, lm):
    with keeping.http.stream(
        "POST",
        "/api/workflows/runs",
        json={"workflow_id": "sql", "input": {"prompt": SQL} | GREEDY, "stream": True},
    ) as got:
        assert got.headers["content-type"].startswith("text/event-stream")
        *events, done = streamed(got)
    *deltas, last = map(json.loads, events)
    text = "".join(event["delta"] for event in deltas)
    assert (done, last["status"]) == ("[DONE]", "completed")
    assert {event["status"] for event in deltas} == {"processing"}
    assert text == last["output"]["text"] == offline(lm, "sql", ("user", SQL))
    assert keeping.http.get(f"/api/tasks/{last['task_id']}").json() == last


def test_cancelling_frees_the_engine(keeping, lm, slow):
    id = run(keeping.http, max_tokens=100, wait_for_completion=False).json()["task_id"]
    wait_for(lambda: status(keeping, id) == "processing")

    def cancel():
        return keeping.http.post(f"/api/tasks/{id}/cancel")

    got = cancel()
    start = time.monotonic()
    assert (got.status_code, got.json()["status"]) == (200, "cancelled")
    wait_for(lambda: not busy(lm))
    assert time.monotonic() - start < 0.5  # all of it would take 5 s
    assert cancel().status_code == 409
    assert status(keeping, id) == "cancelled"
    assert not keeping.service.live.runs


@pytest.mark.parametrize("is_over", [False, True])
def test_a_deleted_task_leaves_nothing(keeping, lm, slow, is_over):
    tokens = 1 if is_over else 100
    id = run(keeping.http, max_tokens=tokens, wait_for_completion=False).json()["task_id"]
    wait_for(lambda: status(keeping, id) == ("completed" if is_over else "processing"))
    got = keeping.http.delete(f"/api/tasks/{id}")
    assert (got.status_code, got.json()) == (200, {"deleted": id})
    wait_for(lambda: not busy(lm))
    assert keeping.http.get(f"/api/tasks/{id}").status_code == 404
    assert keeping.http.delete(f"/api/tasks/{id}").status_code == 404


def test_tasks_that_are_over_for_long_are_forgotten(lm, store):
    over, at_work = (store.tasks.create("", "base", {"prompt": "hi"}) for _ in range(2))
    store.tasks.set(over.id, "completed", output={})
    service = Service(lm, store, limits=Limits(task_days=0))
    with contextlib.suppress(TimeoutError):
        asyncio.run(asyncio.wait_for(expire(service), 0.5))
    assert store.tasks.get(at_work.id, [""]).status == "pending"
    with pytest.raises(NoRecord):
        store.tasks.get(over.id, [""])


@pytest.mark.parametrize("stream", [False, True])
def test_whoever_waits_for_a_run_that_is_cancelled_is_told(keeping, lm, slow, stream):
    answers = []

    def ask():
        with client(keeping) as http:
            answers.append(run(http, max_tokens=100, stream=stream))

    asking = threading.Thread(target=ask)
    asking.start()
    wait_for(lambda: keeping.service.live.runs and busy(lm))
    time.sleep(0.2)  # the stream has begun
    [id] = keeping.service.live.runs
    assert keeping.http.post(f"/api/tasks/{id}/cancel").status_code == 200
    asking.join()
    [got] = answers
    assert "was cancelled" in got.text
    assert got.status_code == (200 if stream else 409)
    if stream:
        *_, error, done = streamed(got)
        assert (list(json.loads(error)), done) == (["error"], "[DONE]")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels_what_it_waits_for(keeping, lm, slow, stream):
    given = {"prompt": BANKING, "temperature": 0, "max_tokens": 100}
    body = {"workflow_id": "banking", "input": given, "stream": stream}

    async def leave():
        async with httpx.AsyncClient(base_url=keeping.url) as http:
            asking = asyncio.create_task(http.post("/api/workflows/runs", json=body))
            while not busy(lm):
                await asyncio.sleep(0.01)
            [id] = keeping.service.live.runs
            asking.cancel()
            return id

    id = asyncio.run(leave())
    start = time.monotonic()
    wait_for(lambda: not busy(lm) and not keeping.service.live.runs)
    assert time.monotonic() - start < 0.5  # all of it would take 5 s
    assert status(keeping, id) == "cancelled"


def test_a_session_is_a_conversation_and_its_history_is_read(keeping, lm):
    made = keeping.http.post("/v1/conversations", json={"system": "Be brief."}).json()["id"]
    first = run(keeping.http, session_id=made).json()
    assert first["session_id"] == made
    second = run(keeping.http, SQL, "sql", session_id=made).json()["output"]["text"]
    said = first["output"]["text"]
    told = [("system", "Be brief."), ("user", BANKING), ("assistant", said), ("user", SQL)]
    assert second == offline(lm, "sql", *told)
    turns = keeping.http.get(f"/v1/conversations/{made}").json()["turns"]
    assert [turn["content"] for turn in turns] == [BANKING, said, SQL, second]
    assert [turn["mix"] for turn in turns] == ["", "banking", "", "sql"]


@pytest.mark.parametrize("wait", [False, True])
def test_a_failure_is_never_a_200(lm, store, monkeypatch, wait):
    def broken(batch):
        raise ZeroDivisionError

    with running(Service(lm, store)) as keeping:
        with monkeypatch.context() as patch:
            patch.setattr(lm.engine._core, "forward", broken)
            got = run(keeping.http, wait_for_completion=wait)
            if wait:
                assert got.status_code == 500
                return
            id = got.json()["task_id"]
            wait_for(lambda: keeping.http.get(f"/api/tasks/{id}").status_code != 200)
        later = keeping.http.get(f"/api/tasks/{id}")
        assert (later.status_code, f"The task {id} failed: " in later.text) == (500, True)
        assert run(keeping.http).status_code == 200


@pytest.mark.parametrize("way", [{}, {"stream": True}, {"wait_for_completion": False}])
def test_a_run_that_takes_too_long_fails(lm, store, slow, way):
    with running(Service(lm, store, limits=Limits(timeout_s=0.3))) as keeping:
        got = run(keeping.http, max_tokens=100, **way)
        if not way:
            assert got.status_code == 504
        elif "stream" in way:
            *_, error, _ = streamed(got)
            assert "took longer" in json.loads(error)["error"]["message"]
            id = json.loads(streamed(got)[0])["task_id"]
        else:
            id = got.json()["task_id"]
        wait_for(lambda: not keeping.service.live.runs)
        if way:
            later = keeping.http.get(f"/api/tasks/{id}")
            assert (later.status_code, "took longer" in later.text) == (500, True)


def test_the_end_of_the_server_waits_for_tasks_then_fails_them(shop, store, monkeypatch):
    with loramix.open(shop.base, shop.library) as lm:
        forward = lm.engine._core.forward

        def slow(batch):
            time.sleep(0.05)
            return forward(batch)

        monkeypatch.setattr(lm.engine._core, "forward", slow)
        with running(Service(lm, store, limits=Limits(shutdown_s=1))) as keeping:
            ids = [
                run(keeping.http, max_tokens=num, wait_for_completion=False).json()["task_id"]
                for num in (2, 100)
            ]
    short, long = (store.tasks.get(id, [""]) for id in ids)
    assert (short.status, long.status) == ("completed", "failed")
    assert "shutting down" in long.error


def test_a_task_whose_server_died_is_failed_at_the_next_start(lm, store):
    id = store.tasks.create("", "base", {"prompt": "hi"}).id
    with running(Service(lm, store)) as keeping:
        got = keeping.http.get(f"/api/tasks/{id}")
        assert (got.status_code, "Its server ended" in got.text) == (500, True)


def test_a_shared_database_keeps_what_other_servers_do(lm, store, monkeypatch):
    monkeypatch.setattr(store._database, "is_shared", True)
    young = store.tasks.create("", "base", {"prompt": "hi"}).id
    service = Service(lm, store, limits=Limits(timeout_s=100, shutdown_s=10))
    abandon(service)
    assert store.tasks.get(young, [""]).status == "pending"
    now = time.time()
    monkeypatch.setattr("loramix.serve.runs.time.time", lambda: now + 111)
    abandon(service)
    assert store.tasks.get(young, [""]).status == "failed"


def test_tasks_belong_to_the_key_that_made_them_and_adapters_to_theirs(keeping, lm, slow):
    keys = keeping.service.store.keys
    secrets = {
        name: keys.add(name, adapters=[adapter])[1]
        for name, adapter in {"ada": "banking", "bob": "sql"}.items()
    }
    admin = keys.add("root", role="admin")[1]
    with (
        client(keeping, secrets["ada"]) as ada,
        client(keeping, secrets["bob"]) as bob,
        client(keeping, admin) as root,
    ):
        id = run(ada, max_tokens=100, wait_for_completion=False).json()["task_id"]
        place = f"/api/tasks/{id}"
        session = ada.post("/v1/conversations", json={}).json()["id"]
        for other in (bob, root):
            got = [other.get(place), other.delete(place), other.post(f"{place}/cancel")]
            got.append(run(other, workflow="base", session_id=session))
            assert {each.status_code for each in got} == {404}
        assert ada.get(place).json()["status"] in ("pending", "processing")
        assert ada.delete(place).json() == {"deleted": id}
        assert run(bob, workflow="banking").status_code == 404
        assert run(bob, workflow="sql:0.5+banking:0.1").status_code == 404
        assert bob.get("/api/workflows/banking/schema").status_code == 404
        assert [w["workflow_id"] for w in bob.get("/api/workflows").json()] == [
            "base", "auto", "sql",
        ]  # fmt: skip
        routed = run(bob, BANKING, "auto").json()["output"]["loramix"]
        assert "banking" not in routed["mix"] + str(routed["scores"])
        keeping.service.live.default = "banking:0.5"
        refused = run(bob, workflow=None)
        assert (refused.status_code, "banking" in refused.text) == (400, False)
        assert "banking" not in bob.get("/api/workflows").text
    with client(keeping) as nobody:
        assert nobody.get("/api/workflows").status_code == 401


def test_tokens_of_a_run_that_is_not_waited_for_are_counted(keeping):
    secret = keeping.service.store.keys.add("ada", tokens_per_minute=5)[1]
    with client(keeping, secret) as ada:
        assert run(ada, wait_for_completion=False).status_code == 202
        wait_for(lambda: not keeping.service.live.runs)
        got = ada.get("/api/workflows")
        assert (got.status_code, "5 tokens" in got.text) == (429, True)


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({}, 400, "input"),
        ({"input": "hi"}, 400, "input"),
        ({"input": {}}, 400, "input.prompt"),
        ({"input": {"prompt": ""}}, 400, "text is empty"),
        ({"input": {"prompt": "a\0b"}}, 400, "U+0000"),
        ({"input": {"prompt": "hi", "max_tokens": 0}}, 400, "max_tokens"),
        ({"input": {"prompt": "hi", "max_tokens": 10**6}}, 400, "lower max_tokens"),
        ({"input": {"prompt": "hi", "top_p": 3}}, 400, "top_p is 3"),
        ({"input": {"prompt": "hi", "temprature": 1}}, 400, "'temperature'"),
        ({"input": {"prompt": "hi"}, "workflow": "sql"}, 400, "'workflow'"),
        ({"input": {"prompt": "hi"}, "workflow_id": "nobody"}, 404, "No adapter 'nobody'"),
        ({"input": {"prompt": "hi"}, "workflow_id": "a++b"}, 400, "adapter"),
        ({"input": {"prompt": "hi"}, "session_id": "x"}, 404, "no conversation"),
        ({"input": {"prompt": "hi"}, "metadata": {"a": [1]}}, 400, "metadata"),
        ({"input": {"prompt": "hi"}, "output_only": True, "wait_for_completion": False}, 400,
         "output_only"),
        ({"input": {"prompt": "hi"}, "output_only": True, "stream": True}, 400, "stream"),
        ({"input": {"prompt": "hi"}, "wait_for_completion": False, "stream": True}, 400, "stream"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(keeping, body, status, says):
    got = keeping.http.post("/api/workflows/runs", json=body)
    assert (got.status_code, says in got.json()["error"]["message"]) == (status, True), got.text


def test_no_such_task_and_no_store(lm, keeping):
    assert keeping.http.get("/api/tasks/x").status_code == 404
    assert keeping.http.post("/api/tasks/x/cancel").status_code == 404
    with running(Service(lm)) as bare:
        got = run(bare.http)
        assert (got.status_code, "keeps nothing" in got.text) == (400, True)
        assert bare.http.get("/api/workflows").status_code == 200
