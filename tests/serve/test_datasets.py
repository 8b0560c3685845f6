"""Rows over HTTP: what was uploaded is looked at line by line, and nothing bad stays."""

from __future__ import annotations

import dataclasses
import json

import pytest

from loramix.engine.local import LocalEngine
from loramix.library import Library
from loramix.lm import LM
from loramix.serve.limits import Limits
from loramix.serve.service import Live, Service
from loramix.serve.training import Training
from loramix.store import Store
from loramix.train.dataset import load_named
from tests.serve.front import running
from tests.tiny import tiny_base

ROWS = b'{"prompt": "red", "completion": "a colour"}\n' * 3


@pytest.fixture(scope="module")
def front(tmp_path_factory):
    place = tmp_path_factory.mktemp("datasets")
    base, library = tiny_base(), Library(place / "library")
    url = f"sqlite:///{place / 'loramix.db'}"
    limits = Limits(dataset_bytes=20_000, dataset_rows=50)
    training = Training(place / "work", url, "base", base)
    with (
        LM(LocalEngine(base, library=library), library) as lm,
        Store.open(url) as store,
        running(Service(lm, store, limits, training=training)) as front,
    ):
        yield front


def upload(front, name, content=ROWS, file="rows.jsonl", **query):
    return front.http.post(
        f"/v1/datasets/{name}/file", files={"file": (file, content)}, params=query
    )


def test_what_was_uploaded_is_listed_shown_trained_on_and_deleted(front):
    made = upload(front, "colours", b'{"x"\n' + ROWS)
    assert made.status_code == 201, made.text
    body = made.json()
    assert (body["kind"], body["shape"], body["rows"], body["bad_rows"]) == (
        "jsonl",
        "alpaca",
        3,
        1,
    )
    assert body["problems"][0]["line"] == 1
    assert "not JSON" in body["problems"][0]["what"]
    assert front.http.get("/v1/datasets").json() == {"data": [body]}
    assert front.http.get("/v1/datasets/colours").json() == body
    assert upload(front, "colours").status_code == 400
    csv = upload(front, "colours", b"question,answer\nwhy,because\n", "x.CSV", replace=True)
    assert (csv.json()["kind"], csv.json()["rows"]) == ("csv", 1)
    folder = front.service.training.datasets.folder
    assert sorted(file.name for file in folder.iterdir()) == ["colours.csv", "dataset_info.json"]
    assert load_named(["colours"], folder).samples[0].example.answer == "because"
    assert front.http.delete("/v1/datasets/colours").json() == {"deleted": "colours"}
    assert [file.name for file in folder.iterdir()] == ["dataset_info.json"]
    for method in ("GET", "DELETE"):
        gone = front.http.request(method, "/v1/datasets/colours")
        assert (gone.status_code, "upload it" in gone.json()["error"]["message"]) == (404, True)


def test_a_preview_shows_what_is_learned(front):
    upload(front, "colours", replace=True)
    shown = front.http.get("/v1/datasets/colours/preview", params={"rows": 2, "start": 1}).json()
    assert [row["line"] for row in shown["rows"]] == [2, 3]
    row = shown["rows"][0]
    assert [piece["learned"] for piece in row["pieces"]] == [False, True]
    assert row["pieces"][1]["text"] == "a colour</s>"
    assert 0 < row["learned_tokens"] < row["tokens"]
    for bad in ({"rows": 0}, {"rows": 51}, {"start": -1}, {"max_length": 0}):
        assert front.http.get("/v1/datasets/colours/preview", params=bad).status_code == 400


def test_rows_are_checked_as_a_training_would_read_them(front):
    long = json.dumps({"prompt": "x " * 300, "completion": "y"}).encode() + b"\n"
    upload(front, "mixed", ROWS + long + b"{}\n" + ROWS[:44])
    got = front.http.get("/v1/datasets/mixed/check").json()
    assert (got["checked_rows"], got["bad_rows"], got["twice"]) == (6, 2, 3)
    assert [problem["line"] for problem in got["problems"]] == [4, 5]
    assert "cutoff_len" in got["problems"][0]["what"]
    assert front.http.get("/v1/datasets/nobody/check").status_code == 404


SHAPES = {
    "text": {"text": "once upon a time"},
    "alpaca": {"instruction": "a", "input": "b", "output": "c", "history": [["d", "e"]]},
    "sharegpt": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    "openai": {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        "tools": [{"name": "f"}],
    },
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_registered_dataset_is_read_as_its_file_is(front, shape, tmp_path):
    from loramix.train.dataset import load

    line = json.dumps(SHAPES[shape]).encode() + b"\n"
    assert upload(front, "shaped", line, replace=True).json()["shape"] == shape
    (tmp_path / "shaped.jsonl").write_bytes(line)
    folder = front.service.training.datasets.folder
    assert load_named(["shaped"], folder).samples == load(tmp_path / "shaped.jsonl").samples


@pytest.mark.parametrize(
    ("name", "content", "file", "says"),
    [
        ("bad", ROWS, "rows.exe", "is a 'exe'"),
        ("bad", ROWS, "rows", "is a ''"),
        ("bad", ROWS, "rows.jsonl.gz", "is a 'gz'"),
        ("bad", ROWS, "../../rows.py", "is a 'py'"),
        ("bad", ROWS, "rows.j/son", "is a ''"),
        ("bad", b"", "rows.jsonl", "empty"),
        ("bad", b"\n\n", "rows.jsonl", "No row"),
        ("bad", b"[1, 2]", "rows.json", "No row"),
        ("bad", b'[{"a": 1}]', "rows.json", "no known shape"),
        ("bad", b'[{"text": "x"}', "rows.json", "broken at line 1"),
        ("bad", b'{"text": " "}', "rows.jsonl", "line 1"),
        ("bad", ROWS * 17, "rows.jsonl", "more than 50 rows"),
        ("bad", b"PAR1xxxxPAR1", "rows.parquet", "parquet"),
        ("BAD", ROWS, "rows.jsonl", "cannot name"),
        ("..%2Fbad", ROWS, "rows.jsonl", ""),
        ("bad", ROWS * 2000, "rows.jsonl", "too large"),
    ],
)
def test_a_bad_upload_leaves_nothing(front, name, content, file, says):
    before = front.http.get("/v1/datasets").json()
    got = upload(front, name, content, file)
    assert got.status_code in (400, 404, 413), got.text
    assert says in got.json()["error"]["message"]
    assert front.http.get("/v1/datasets").json() == before
    assert not any("bad" in file.name for file in front.service.training.folder.rglob("*"))


def test_a_dataset_is_not_called_as_their_list_is(front):
    kept = front.http.get("/v1/datasets").json()
    got = upload(front, "dataset_info", b'[{"prompt": "a", "completion": "b"}]', "rows.json")
    assert (got.status_code, "give another name" in got.text) == (400, True)
    assert front.http.get("/v1/datasets").json() == kept


def test_a_full_disk_is_said(front, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfileobj", full)  # the disk of the form, before the folder's own
    got = upload(front, "colours2")
    assert (got.status_code, "No space left" in got.text) == (507, True)


def test_a_form_holds_one_file(front):
    two = [("file", ("a.jsonl", ROWS)), ("file", ("b.jsonl", ROWS))]
    for files in (two, None):
        got = front.http.post(
            "/v1/datasets/bad/file", files=files, data={} if files else {"a": "b"}
        )
        assert got.status_code == 400
        assert "file" in got.json()["error"]["message"]


def test_a_server_without_a_place_to_train_says_so(front):
    service = dataclasses.replace(front.service, training=None, live=Live())
    with running(service) as other:
        for path in ("/v1/datasets", "/v1/datasets/x"):
            got = other.http.get(path)
            assert (got.status_code, "does not train" in got.text) == (400, True)
        assert other.post("/v1/jobs", config={}).status_code == 400


def test_the_api_describes_jobs_and_datasets(front):
    paths = front.http.get("/openapi.json").json()["paths"]
    assert (
        "text/event-stream" in paths["/v1/jobs/{id}/events"]["get"]["responses"]["200"]["content"]
    )
    upload = paths["/v1/datasets/{name}/file"]["post"]["requestBody"]["content"]
    assert "file" in upload["multipart/form-data"]["schema"]["properties"]
