"""Trainings over HTTP: real processes, followed, stopped, resumed, and outliving the server."""

from __future__ import annotations

import json
import os
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

import loramix
from loramix.engine.local import LocalEngine
from loramix.errors import RouteError
from loramix.library import Library
from loramix.lm import LM
from loramix.serve import following
from loramix.serve.service import Service
from loramix.serve.training import Training
from loramix.store import Store
from tests.serve.front import running, served, wait_for
from tests.shop import build
from tests.tiny import tiny_base

SOURCE = Path(loramix.__file__).parents[1]
SETTINGS = {"lora_rank": 2, "learning_rate": 0.01, "save_strategy": "steps", "save_steps": 1,
            "disable_gradient_checkpointing": True, "logging_steps": 1}  # fmt: skip
LONG = {"num_train_epochs": 400, "fit_router": False}


def rows(word, count=12):
    lines = [{"prompt": f"{word} {n}", "completion": f"{word}!"} for n in range(count)]
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def upload(http, name, content=None, file="rows.jsonl", **query):
    files = {"file": (file, rows(name) if content is None else content)}
    return http.post(f"/v1/datasets/{name}/file", files=files, params=query)


def begin(http, name="cats", **config):
    return http.post(
        "/v1/jobs", json={"config": {"name": name, "dataset": name, **SETTINGS, **config}}
    )


def shown(http, id):
    got = http.get(f"/v1/jobs/{id}")
    assert got.status_code == 200, got.text
    return got.json()


def wait(http, id, is_so, seconds=60):
    end = time.monotonic() + seconds
    while not is_so(job := shown(http, id)):
        assert time.monotonic() < end, job
        time.sleep(0.05)
    return job


def is_over(job):
    return job["state"] not in ("queued", "running")


def has_begun(job):
    return any(one["step"] > 1 for one in job["progress"].values())


def events(http, id, last=None, until=lambda event: False):
    """What a client of the stream reads: (id, event, data) until the end, or what it waits for."""
    headers = {} if last is None else {"last-event-id": last}
    found = []
    with http.stream("GET", f"/v1/jobs/{id}/events", headers=headers) as stream:
        assert stream.status_code == 200
        assert stream.headers["content-type"].startswith("text/event-stream")
        fields = {}
        for line in stream.iter_lines():
            key, _, value = line.partition(": ")
            if line:
                fields[key] = value
            elif "event" in fields:
                found.append((fields["id"], fields["event"], json.loads(fields["data"])))
                if until(found[-1]):
                    break
                fields = {}
    return found


@contextmanager
def opened(place, shop):
    base, library = tiny_base(seed=1), Library(shop.library)
    url = f"sqlite:///{place / 'loramix.db'}"
    training = Training(place / "work", url, shop.base, base)
    with (
        LM(LocalEngine(base, library=library), library) as lm,
        Store.open(url) as store,
        running(Service(lm, store, roots=(place / "root",), training=training)) as front,
    ):
        yield front


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("jobs")
    (place / "root" / "inner").mkdir(parents=True)
    (place / "secret.jsonl").write_bytes(rows("secret"))
    (place / "root" / "dogs.jsonl").write_bytes(rows("dogs") + b"{")
    (place / "root" / "link.jsonl").symlink_to(place / "secret.jsonl")
    evil = {"evil": {"file_name": "../../secret.jsonl"}, "hub": {"hf_hub_url": "a/b"}}
    (place / "root" / "inner" / "dataset_info.json").write_text(json.dumps(evil))
    return place


@pytest.fixture(scope="module")
def front(place):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(SOURCE))
        with opened(place, build(place)) as front:
            for name in ("cats", "frogs"):
                assert upload(front.http, name).status_code == 201
            yield front


def test_an_expert_is_trained_and_answers_without_a_restart(front):
    http = front.http
    assert front.chat(model="cats").status_code == 404
    got = begin(http, name="cats", num_train_epochs=30, val_size=2)
    assert got.status_code == 201, got.text
    job = got.json()
    assert job["experts"] == ["cats"]
    assert job["config"]["dataset"] == "cats"
    told = events(http, job["id"])
    kinds = [kind for _, kind, _ in told]
    assert kinds[0] == "state"
    assert kinds[-1] == "end"
    assert told[-1][2] == {"state": "done", "error": ""}
    steps = [data["step"] for _, kind, data in told if kind == "progress"]
    assert steps == sorted(steps)
    last = [data for _, kind, data in told if kind == "progress"][-1]
    assert last["expert"] == "cats"
    assert last["step"] == last["num_steps"]
    assert last["validation"] > 0
    assert last["memory_bytes"] > 0
    judged = next(data for _, kind, data in told if kind == "judged")["experts"][0]
    assert judged["expert"] < judged["base"]
    done = shown(http, job["id"])
    assert (done["state"], done["progress"]["cats"]["step"]) == ("done", last["step"])
    assert front.chat(model="cats").json()["model"] == "cats"
    wait_for(lambda: "cats" in front.post("/v1/route", text="cats 3").json().get("scores", ()))
    assert front.chat("cats 3", model="auto").json()["model"] == "cats"
    assert "cats in" in http.get(f"/v1/jobs/{job['id']}/log").text
    assert begin(http, name="cats").status_code == 400  # the library has it


def test_a_stream_goes_on_behind_the_event_that_was_read_last(front):
    http = front.http
    id = begin(http, name="frogs", num_train_epochs=20, fit_router=False).json()["id"]
    wait(http, id, is_over)
    whole = events(http, id)
    kept = [one for one in whole if one[1] != "state"]
    for n in (0, len(kept) // 2, len(kept) - 2):
        again = events(http, id, last=kept[n][0])
        assert [one for one in again if one[1] != "state"] == kept[n + 1 :]
    ended = http.get(f"/v1/jobs/{id}/events", headers={"last-event-id": whole[-1][0]})
    assert ended.status_code == 204
    for bad in ("x", "7", "99999999", "1.x", "-1", "9" * 40):
        got = http.get(f"/v1/jobs/{id}/events", headers={"last-event-id": bad})
        assert got.status_code == 400, bad
        assert "vent" in got.json()["error"]["message"]
    folder = Path(front.service.store.jobs.get(id).folder)
    assert any((folder / "training").glob("checkpoint-*"))
    assert http.delete(f"/v1/jobs/{id}").json() == {"deleted": id}
    assert http.get(f"/v1/jobs/{id}").status_code == 404
    assert not folder.exists()


def test_a_job_is_stopped_and_resumed_while_another_waits(front):
    http = front.http
    id = begin(http, name="toads", dataset="frogs", **LONG).json()["id"]
    wait(http, id, has_begun)
    assert http.post(f"/v1/jobs/{id}/resume").status_code == 409
    assert http.delete(f"/v1/jobs/{id}").status_code == 409
    assert http.delete("/v1/datasets/frogs").status_code == 409
    same = begin(http, name="toads", dataset="frogs")
    assert (same.status_code, "makes toads" in same.json()["error"]["message"]) == (409, True)
    later = begin(http, name="newts", dataset="frogs", **LONG).json()["id"]
    time.sleep(1)
    assert shown(http, later)["state"] == "queued"
    assert http.post(f"/v1/jobs/{later}/stop").status_code == 202
    assert wait(http, later, is_over)["state"] == "stopped"
    assert http.post(f"/v1/jobs/{id}/stop").status_code == 202
    told = events(http, id)
    assert told[-1][2]["state"] == "stopped"
    assert http.post(f"/v1/jobs/{id}/stop").status_code == 409
    step = shown(http, id)["progress"]["toads"]["step"]
    assert http.post(f"/v1/jobs/{id}/resume").status_code == 202
    after = wait(http, id, lambda job: job["progress"]["toads"]["step"] > step)
    assert after["state"] == "running"
    os.kill(front.service.store.jobs.get(id).pid, signal.SIGKILL)
    told = events(http, id, last=told[-1][0])
    assert told[-1][1] == "end"
    assert told[-1][2]["state"] == "failed"
    assert "killed" in told[-1][2]["error"]
    queued = http.post(f"/v1/jobs/{id}/resume").json()
    assert http.post(f"/v1/jobs/{queued['id']}/stop").status_code == 202
    assert wait(http, id, is_over)["state"] == "stopped"


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"name": "x"}, "'x' has no rows"),
        ({"dataset": "cats"}, "name is missing"),
        ({"name": "x", "dataset": "cat"}, "no dataset 'cat'"),
        ({"name": "x", "dataset": "cats", "lora_rnk": 2}, "Did you mean 'lora_rank'"),
        ({"name": "x", "dataset": "cats", "lora_rank": "two"}, "lora_rank is 'two'"),
        ({"name": "x", "dataset": "cats", "lora_rank": -1}, "rank is -1"),
        ({"name": "../x", "dataset": "cats"}, "cannot name an adapter"),
        ({"name": "x", "dataset": "cats", "output_dir": "/tmp/x"}, "output_dir is not a client's"),
        ({"name": "x", "dataset": "cats", "resume_from_checkpoint": "/x"}, "goes on from its own"),
        ({"name": "x", "dataset": "cats", "export_dir": "/tmp/x"}, "export_dir is not a client's"),
        ({"name": "x", "dataset": "cats", "adapter_name_or_path": "/etc"}, "this server has"),
        ({"name": "x", "dataset": "cats", "library": "/tmp/x"}, "library is not a client's"),
        ({"name": "x", "dataset": "cats", "model_name_or_path": "other"}, "experts of the base"),
        ({"name": "x", "data": "/etc/passwd"}, "not inside this server's roots"),
        ({"name": "x", "data": "../secret.jsonl"}, "not inside"),
        ({"name": "x", "data": "link.jsonl"}, "not inside"),
        ({"name": "x", "data": "a\0b"}, "not inside"),
        ({"name": "x", "data": ["/etc/passwd"]}, "expected text"),
        ({"name": "x", "data": "dogs.jsonl", "eval_data": "/etc/passwd"}, "eval_data is"),
        ({"name": "x", "dataset": "evil", "dataset_dir": "inner"}, "not inside"),
        ({"name": "x", "dataset": "hub", "dataset_dir": "inner"}, "no file on this server"),
        ({"name": "x", "dataset": "cats", "dataset_dir": "/etc"}, "dataset_dir is"),
        ({"experts": {"x": {"data": "/etc/passwd"}}}, "data is '/etc/passwd'"),
        ({"experts": {"x": {"dataset": "nobody"}}}, "no dataset 'nobody'"),
        ({"experts": []}, "experts is no group"),
        ({"experts": {"x": 3}}, "has no keys"),
        ({"experts": {"x": {"dataset": "cats", "output_dir": "/tmp"}}}, "Unknown key 'output_dir'"),
    ],
)
def test_a_training_that_cannot_be_is_refused_before_it_begins(front, config, says):
    before = len(front.http.get("/v1/jobs").json()["data"])
    got = front.http.post("/v1/jobs", json={"config": config})
    assert got.status_code == 400, got.text
    assert says in got.json()["error"]["message"]
    assert len(front.http.get("/v1/jobs").json()["data"]) == before


def test_rows_inside_a_root_are_read_and_bad_ones_told(front):
    config = {"name": "dogs", "data": "dogs.jsonl", "max_bad_rows": 0, **LONG}
    got = front.http.post("/v1/jobs", json={"config": config})
    assert got.status_code == 201
    id = got.json()["id"]
    assert got.json()["config"]["data"] == "dogs.jsonl"
    job = wait(front.http, id, is_over)
    assert (job["state"], "line 13" in job["error"]) == ("failed", True)
    assert front.http.get("/v1/jobs").json()["data"][-1] == job


def test_the_rest_of_the_api_refuses_in_words(front):
    http = front.http
    paths = ["GET", "DELETE", "POST /stop", "POST /resume", "GET /events", "GET /log"]
    for method, _, path in (one.partition(" ") for one in paths):
        got = http.request(method, f"/v1/jobs/nobody{path}")
        assert (got.status_code, got.json()["error"]["message"]) == (
            404,
            "There is no job 'nobody'.",
        )
    assert http.post("/v1/jobs", json={"config": {}, "x": 1}).status_code == 400
    assert http.post("/v1/jobs", json={"config": "yes"}).status_code == 400


def test_a_router_that_cannot_be_read_is_logged_and_nothing_else_is_lost(lm, store, monkeypatch):
    def broken(self):
        raise RouteError("The router is damaged.")

    said = []
    monkeypatch.setattr(Service, "reload_router", broken)
    monkeypatch.setattr(following.log, "error", lambda *_, extra: said.append(extra["facts"]))
    job = store.jobs.create("train", "sql", {}, "nowhere")
    store.jobs.end(job.id, "done")
    following.take_up(Service(lm, store), job.id)
    assert said == [{"job": job.id, "error": "The router is damaged."}]


def test_a_job_outlives_its_server_that_is_killed(tmp_path, monkeypatch):
    shop = build(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(SOURCE))
    monkeypatch.setenv("LORAMIX_DATABASE", f"sqlite:///{tmp_path / 'loramix.db'}")
    words = [*shop.flags, "--set", f"training={tmp_path / 'work'}"]
    with served(*words) as (process, url), httpx.Client(base_url=url, timeout=60) as http:
        assert upload(http, "cats").status_code == 201
        id = begin(http, num_train_epochs=900, fit_router=False).json()["id"]
        before = events(http, id, until=lambda event: event[1] == "progress")
        process.kill()
        process.wait()
    with served(*words) as (_, url), httpx.Client(base_url=url, timeout=60) as http:
        job = shown(http, id)
        assert job["state"] == "running", job
        assert http.post(f"/v1/jobs/{id}/stop").is_success
        after = events(http, id, last=before[-1][0])
        assert after[-1][2]["state"] == "stopped"
        steps = [data["step"] for _, kind, data in before + after if kind == "progress"]
        assert steps == sorted(set(steps))
