"""Pushing with the hub's own client to a stand-in of the hub: all in one commit, or nothing."""

from __future__ import annotations

import pytest

from loramix.errors import FormatError, HubError
from loramix.formats.publish import plan
from tests.formats.forge import TOKEN, running
from tests.formats.layouts import folder


@pytest.fixture
def forge():
    with running() as forge:
        yield forge


@pytest.fixture
def adapter(tmp_path):
    place = folder(tmp_path / "mine")
    (place / ".cache").mkdir()
    (place / ".cache" / "lock").write_text("x")
    return place


def test_a_folder_becomes_one_commit(forge, adapter):
    done = forge.loramix("push", adapter, "me/mine", "--private")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{forge.url}/me/mine/commit/{1:040d}"
    sent = forge.repositories["me/mine"]
    assert sorted(sent) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    for name in sent.keys() - {"README.md"}:
        assert sent[name] == (adapter / name).read_bytes()
    assert sent["README.md"].startswith(b"---\nbase_model: tiny/llama\n")
    assert (forge.commits, forge.private["me/mine"]) == (1, True)


def test_a_merge_is_pushed_from_python(forge, adapter, tmp_path):
    program = f"""
import loramix
merger = loramix.Merger(None, [{str(adapter)!r}] * 2)
print(merger.merge("weighted", weights=[2, -1]).push_to_hub("me/both", private=True))
"""
    done = forge.python("-c", program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{forge.url}/me/both/commit/{1:040d}"
    sent = forge.repositories["me/both"]
    assert {"README.md", "adapter_model.safetensors", "merge.json"} <= sent.keys()
    assert b"mine:2+mine-2:-1" in sent["README.md"]
    assert forge.private["me/both"]


def test_a_dry_run_sends_nothing(forge, adapter):
    done = forge.loramix("push", adapter, "me/mine", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "adapter_model.safetensors" in done.stdout
    assert "3 files" in done.stdout
    assert forge.asked == []
    assert not (adapter / "README.md").exists()


REFUSALS = {
    "401": ("preupload", [401], "answered 401; set HF_TOKEN"),
    "403": ("preupload", [403], "answered 403; the token may not write there"),
    "409": ("/commit/", [409], "answered 409; somebody else changed it meanwhile"),
    "412": ("/commit/", [412], "answered 412; somebody else changed it meanwhile"),
    "429": ("/commit/", [429] * 9, "answered 429; too many requests"),
    "broken upload": ("/blob/", [400], "Nothing was committed to me/mine: "),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_is_one_line_and_no_commit(name, forge, adapter):
    forge.repositories["me/mine"], forge.private["me/mine"] = {}, False
    route, statuses, message = REFUSALS[name]
    forge.fails[route] = statuses
    done = forge.loramix("push", adapter, "me/mine")
    assert done.returncode == 1
    error = [line for line in done.stderr.splitlines() if line.startswith("Error:")]
    assert len(error) == 1
    assert message in error[0]
    assert (forge.commits, forge.repositories["me/mine"]) == (0, {})
    assert TOKEN not in done.stdout + done.stderr


def test_a_wrong_token_is_never_shown(forge, adapter):
    done = forge.loramix("push", adapter, "me/mine", token="hf_wrongwrongwrong")
    assert done.returncode == 1
    assert "answered 401" in done.stderr
    assert "hf_wrong" not in done.stdout + done.stderr


def test_a_push_that_broke_off_goes_on(forge, adapter):
    """Two large files, the second fails; then only the second is sent."""
    (adapter / "extra.gguf").write_bytes(b"GGUF" + b"x" * 5000)
    forge.fails["/blob/"] = [400]
    assert forge.loramix("push", adapter, "me/mine").returncode == 1
    assert (forge.commits, forge.repositories["me/mine"]) == (0, {})
    sent = len(forge.blobs)
    forge.asked.clear()
    done = forge.loramix("push", adapter, "me/mine")
    assert done.returncode == 0, done.stderr
    uploads = [line for line in forge.asked if line.startswith("PUT")]
    assert (len(uploads), len(forge.blobs), forge.commits) == (2 - sent, 2, 1)
    assert len(forge.repositories["me/mine"]) == 4


def test_a_server_that_stumbles_is_tried_again(forge, adapter):
    forge.fails["/blob/"] = [503]
    done = forge.loramix("push", adapter, "me/mine")
    assert done.returncode == 0, done.stderr
    assert forge.commits == 1


def test_private_is_never_ignored(forge, adapter):
    forge.repositories["me/mine"], forge.private["me/mine"] = {}, False
    done = forge.loramix("push", adapter, "me/mine", "--private")
    assert done.returncode == 1
    assert "exists and is public" in done.stderr
    assert forge.commits == 0


def test_nothing_is_sent_of_what_is_no_adapter_or_model(tmp_path, adapter):
    with pytest.raises(HubError, match="is no hub id"):
        plan(adapter, "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FormatError, match="give the folder of an adapter or a model"):
        plan(tmp_path / "empty", "me/mine")
    with pytest.raises(FormatError, match="is no folder"):
        plan(tmp_path / "nothing", "me/mine")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(FormatError, match="has no adapter_model"):
        plan(adapter, "me/mine")
