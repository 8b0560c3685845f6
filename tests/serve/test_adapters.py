"""Adapters come and go while the server runs, and nothing bad stays."""

import pytest
from safetensors.torch import load_file, save_file

from loramix.engine.local import LocalEngine
from loramix.formats import peft
from loramix.library import Library
from loramix.lm import LM
from loramix.serve.service import Caller, Service
from tests.serve.front import running
from tests.tiny import random_adapter, tiny_base


@pytest.fixture
def front(tmp_path):
    base = tiny_base()
    library = Library(tmp_path / "library")
    for seed, name in enumerate(("a", "b")):
        library.put(random_adapter(base.model, name, seed=seed))
    roots = tmp_path / "roots"
    peft.write(random_adapter(base.model, "fresh", seed=7), roots / "fresh")
    peft.write(random_adapter(base.model, "other", seed=8), roots / "other")
    wide = tiny_base(hidden_size=64, seed=2).model
    peft.write(random_adapter(wide, "wide"), roots / "wide")
    peft.write(random_adapter(base.model, "secret", seed=9), tmp_path / "secret")
    (roots / "link").symlink_to(tmp_path / "secret")
    with (
        LM(LocalEngine(base, library=library), library) as lm,
        running(Service(lm, roots=(roots,))) as front,
    ):
        yield front


def load(front, name, path, **more):
    return front.post("/v1/load_lora_adapter", lora_name=name, lora_path=str(path), **more)


def said(front, model):
    return front.complete(model=model, max_tokens=12).json()["choices"][0]["text"]


def files(folder):
    return [("files", (file.name, file.read_bytes())) for file in sorted(folder.iterdir())]


def test_vllms_way_to_load_and_unload(front):
    got = load(front, "c", "fresh")
    assert (got.status_code, got.text) == (200, "Success: LoRA adapter 'c' added successfully.")
    answers = {said(front, model) for model in ("base", "a", "c")}
    assert len(answers) == 3
    again = load(front, "c", "fresh")
    assert again.status_code == 400
    assert again.json()["error"]["type"] == "InvalidUserInput"
    assert "has already been loaded" in again.json()["error"]["message"]
    got = front.post("/v1/unload_lora_adapter", lora_name="c")
    assert got.text == "Success: LoRA adapter 'c' removed successfully."
    assert front.complete(model="c").status_code == 404
    gone = front.post("/v1/unload_lora_adapter", lora_name="c")
    assert (gone.status_code, gone.json()["error"]["type"]) == (404, "NotFoundError")
    assert load(front, "c", "fresh").status_code == 200
    assert said(front, "c") in answers


def test_loading_in_place_serves_the_new_content_at_once(front):
    load(front, "c", "fresh")
    before = said(front, "c")
    assert load(front, "c", "other", load_inplace=True).status_code == 200
    assert said(front, "c") != before


@pytest.mark.parametrize("path", ["../secret", "link", "/etc", "nothing", "fresh/../../secret", ""])
def test_only_folders_inside_the_roots_are_read(front, path):
    assert load(front, "c", path).status_code == 400
    assert load(front, "c", front.service.roots[0].parent / "secret").status_code == 400
    assert front.service.lm.library.names() == ["a", "b"]


def test_an_adapter_of_another_base_is_refused_and_nothing_is_left(front):
    for name, more in (("c", {}), ("a", {"load_inplace": True})):
        before = said(front, "a")
        got = load(front, name, "wide", **more)
        assert got.status_code == 400, got.text
        assert front.service.lm.library.names() == ["a", "b"]
        assert said(front, "a") == before


def test_llamas_scales_are_the_mix_of_requests_that_name_none(front):
    assert front.http.get("/lora-adapters").json()[1] == {
        "id": 1, "name": "b", "path": "b", "scale": 0.0, "task_name": "", "prompt_prefix": ""
    }  # fmt: skip
    assert front.complete(model="").json()["model"] == "base"
    assert front.http.post("/lora-adapters", json=[{"id": 1, "scale": 0.5}]).is_success
    assert [adapter["scale"] for adapter in front.http.get("/lora-adapters").json()] == [0, 0.5]
    assert front.complete(model="").json()["model"] == "b:0.5"
    assert front.complete(model="base").json()["model"] == "base"


def test_a_default_mix_whose_adapter_left_is_said(front):
    front.http.post("/lora-adapters", json=[{"name": "b"}])
    assert front.post("/v1/unload_lora_adapter", lora_name="b").is_success
    got = front.complete(model="")
    assert (got.status_code, "names no mix" in got.text) == (400, True)
    assert [adapter["name"] for adapter in front.http.get("/lora-adapters").json()] == ["a"]
    assert front.http.post("/lora-adapters", json=[{"name": "a"}]).is_success
    assert front.complete(model="").json()["model"] == "a"


def test_an_adapter_is_tried_before_anything_is_in_the_library(front, monkeypatch):
    library, engine = front.service.lm.library, front.service.lm.engine
    generate, seen = engine.generate, []

    def trying(requests):
        seen.append((library.names(), list(requests[0].mix)))
        return generate(requests)

    monkeypatch.setattr(engine, "generate", trying)
    assert load(front, "c", "fresh").is_success
    [(names, [trial])] = seen
    assert names == ["a", "b"]
    assert trial not in engine.statistics().adapters
    assert front.complete(model=trial).status_code == 404
    assert library.names() == ["a", "b", "c"]


def test_a_number_stays_an_adapters_own(front):
    numbers = {a["name"]: a["id"] for a in front.http.get("/lora-adapters").json()}
    front.http.delete("/v1/adapters/a")
    load(front, "aa", "fresh")
    later = {a["name"]: a["id"] for a in front.http.get("/lora-adapters").json()}
    assert later["b"] == numbers["b"]
    assert later["aa"] not in numbers.values()
    assert front.complete(lora=[{"id": numbers["a"], "scale": 1}]).status_code == 400


def test_a_card_is_shown_and_changed(front):
    patch = {"description": "says a", "skills": ["a", "aa"], "weight": 0.5}
    card = front.http.patch("/v1/adapters/a", json=patch).json()
    assert card == front.http.get("/v1/adapters/a").json()
    assert {key: card[key] for key in patch} == patch
    assert front.http.get("/v1/adapters").json()["data"][0] == card
    assert front.http.patch("/v1/adapters/a", json={}).status_code == 400
    assert front.http.patch("/v1/adapters/x", json=patch).status_code == 404
    assert front.http.patch("/v1/adapters/a", json={"base": "x"}).status_code == 400


def test_an_upload_is_taken_in_whole(front):
    folder = front.service.roots[0] / "fresh"
    got = front.http.post("/v1/adapters/c/files", files=files(folder))
    assert (got.status_code, got.json()["name"]) == (200, "c"), got.text
    load(front, "d", "fresh")
    assert said(front, "c") == said(front, "d")
    assert front.http.post("/v1/adapters/c/files", files=files(folder)).status_code == 400
    got = front.http.post("/v1/adapters/c/files?replace=true", files=files(folder))
    assert got.status_code == 200


CONFIG = ("files", ("adapter_config.json", b"{}"))


@pytest.mark.parametrize(
    "upload",
    [
        [],
        [CONFIG],
        [CONFIG, CONFIG],
        [CONFIG, ("files", ("adapter_model.safetensors", b"\x08\0\0\0\0\0\0\0{}" * 9))],
        [CONFIG, ("files", ("adapter_model.bin", b"\x80\x04."))],
        [CONFIG, ("files", ("../../evil.safetensors", b"x"))],
        [CONFIG, ("files", ("/etc/passwd", b"x"))],
        [CONFIG, ("files", ("model.py", b"x"))],
        [("files", (f"{n}.json", b"x")) for n in range(30)],
    ],
)
def test_a_bad_upload_leaves_nothing(front, upload):
    before = sorted(front.service.lm.library.folder.iterdir())
    got = front.http.post("/v1/adapters/c/files", files=upload)
    assert got.status_code == 400, got.text
    assert got.json()["error"]["message"]
    assert sorted(front.service.lm.library.folder.iterdir()) == before
    assert front.complete(model="a").is_success


@pytest.mark.parametrize("broken", ["truncated", "nan"])
def test_a_corrupt_upload_leaves_what_it_would_replace(front, tmp_path, broken):
    parts = dict(part for _, part in files(front.service.roots[0] / "fresh"))
    name = "adapter_model.safetensors"
    if broken == "truncated":
        parts[name] = parts[name][:-100]
    else:
        file = tmp_path / name
        file.write_bytes(parts[name])
        save_file({key: tensor * float("nan") for key, tensor in load_file(file).items()}, file)
        parts[name] = file.read_bytes()
    before = said(front, "a")
    upload = [("files", part) for part in parts.items()]
    got = front.http.post("/v1/adapters/a/files?replace=true", files=upload)
    assert got.status_code == 400, got.text
    assert said(front, "a") == before


def test_a_full_disk_is_said_and_the_service_goes_on(front, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    folder = front.service.roots[0] / "fresh"
    monkeypatch.setattr(peft, "write", full)
    got = front.http.post("/v1/adapters/c/files", files=files(folder))
    assert (got.status_code, "No space left" in got.json()["error"]["message"]) == (507, True)
    monkeypatch.undo()
    assert front.complete(model="a").is_success
    assert front.http.post("/v1/adapters/c/files", files=files(folder)).is_success


def test_a_deleted_file_is_a_clear_error_and_the_service_goes_on(front):
    (front.service.lm.library.folder / "b" / "adapter_model.safetensors").unlink()
    got = front.complete(model="b")
    assert (got.status_code, "adapter_model.safetensors" in got.text) == (500, True)
    assert front.complete(model="a").is_success
    assert "b" in front.http.get("/v1/adapters").json()["damaged"]


def test_who_is_no_admin_changes_nothing_and_sees_only_its_own(front):
    caller = Caller("k", is_admin=False, adapters=frozenset({"a"}))

    async def as_user():
        return caller

    from loramix.serve import service

    app = front.server.config.app
    app.dependency_overrides[service._of_request] = as_user
    for method, path in (("GET", "/v1/adapters"), ("GET", "/lora-adapters"),
                         ("DELETE", "/v1/adapters/a"), ("POST", "/v1/load_lora_adapter"),
                         ("GET", "/metrics")):  # fmt: skip
        got = front.http.request(method, path, json={} if method == "POST" else None)
        assert (got.status_code, got.json()["error"]["type"]) == (403, "permission_error")
    assert '"b"' not in front.http.get("/v1/models").text
    for body in ({"model": "b"}, {"mix": {"a": 1, "b": 0.1}}, {"lora": [{"id": 1}]},
                 {"adapter_id": "b"}):  # fmt: skip
        got = front.complete(**({"model": "base"} | body))
        assert (got.status_code, "'a'" in got.text or "Known: a" in got.text) == (404, True)
    assert front.complete(model="a").is_success
