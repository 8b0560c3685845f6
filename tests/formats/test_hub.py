"""The real client against a small hub on loopback: what is fetched, and what every failure says."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from loramix.errors import AdapterError
from loramix.formats import peft
from loramix.formats.hub import fetch, is_hub_id
from tests.formats.layouts import folder
from tests.served import served

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FETCH = """
import sys
from loramix.errors import AdapterError
from loramix.formats.hub import fetch
try:
    print(fetch(sys.argv[1], sys.argv[2] or None))
except AdapterError as error:
    print(error)
    sys.exit(1)
"""


@dataclass
class Hub:
    """A stand-in for the hub, and a process with the real client of it."""

    files: dict[str, bytes]
    cache: Path
    url: str = ""
    asked: list[str] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)

    def fetch(self, name: str, revision: str = "", **environment: str) -> tuple[int, str]:
        """The exit status and the line printed by a process that fetches `name`."""
        return self.run(FETCH, name, revision, **environment)

    def run(self, script: str, *words: str, **environment: str) -> tuple[int, str]:
        own = {"HF_ENDPOINT": self.url, "HF_HOME": str(self.cache), "HF_HUB_DISABLE_XET": "1"}
        own |= {"HF_HUB_ETAG_TIMEOUT": "5", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*"}
        keep = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}
        done = subprocess.run(
            [sys.executable, "-c", script, *words],
            env=keep | own | {"PYTHONPATH": "src"} | environment,
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert "Traceback" not in done.stderr, done.stderr
        return done.returncode, done.stdout.strip()


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    """The few routes that a download needs, of the repositories good/, gated/ and broken/."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.answer(body=True)

        def do_POST(self):
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.answer(body=True)

        def do_HEAD(self):
            self.answer(body=False)

        def answer(self, body):
            hub.asked.append(self.path)
            hub.tokens.add(self.headers.get("Authorization"))
            status, headers, content = route(hub, self.path, self.headers.get("Authorization"))
            self.send_response(status)
            for key, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *args):
            pass

    return Handler


def route(hub: Hub, path: str, token: str | None) -> tuple[int, dict[str, str], bytes]:
    path = path.split("?")[0]
    if "/broken/" in path:
        return 500, {}, b"oops"
    if "/gated/" in path and token != "Bearer secret":
        return 401, {"X-Error-Code": "GatedRepo", "X-Error-Message": "restricted"}, b""
    if "/good/" not in path and "/gated/" not in path:
        return 401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "not found"}, b""
    if "/v9" in path:
        return 404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "no v9"}, b""
    if path.startswith("/api/"):
        return 200, {"Content-Type": "application/json"}, listing(hub, path)
    name = path.rpartition("/")[2]
    if name not in hub.files:
        return 404, {"X-Error-Code": "EntryNotFound"}, b""
    etag = f'"{hashlib.sha256(hub.files[name]).hexdigest()}"'
    return 200, {"X-Repo-Commit": COMMIT, "ETag": etag}, hub.files[name]


def listing(hub: Hub, path: str) -> bytes:
    """The files of a repository, as the tree or as the model's page lists them."""
    if "/tree/" in path or "/paths-info/" in path:
        return json.dumps(
            [
                {"type": "file", "path": name, "size": len(data), "oid": "0" * 40}
                for name, data in hub.files.items()
            ]
        ).encode()
    names = [{"rfilename": name} for name in hub.files]
    return json.dumps({"id": "good/sql", "sha": COMMIT, "siblings": names}).encode()


@pytest.fixture
def hub(tmp_path):
    source = folder(tmp_path / "source")
    files = {path.name: path.read_bytes() for path in source.iterdir()}
    hub = Hub(files | {"model.safetensors": b"a whole base"}, tmp_path / "cache")
    with served(handler(hub)) as hub.url:
        yield hub


def test_an_adapter_is_fetched_once_and_alone(hub):
    status, path = hub.fetch("good/sql")
    assert status == 0, path
    assert sorted(file.name for file in Path(path).iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert peft.read(path, name="sql").card.base == "tiny/llama"
    asked = len(hub.asked)
    assert hub.fetch("good/sql", HF_HUB_OFFLINE="1") == (0, path)
    assert len(hub.asked) == asked


def test_a_revision_is_asked_for(hub):
    assert hub.fetch("good/sql", "v1")[0] == 0
    assert any("/v1" in path for path in hub.asked)
    assert hub.fetch("good/sql", "v9") == (
        1,
        "good/sql has no revision 'v9'; check it on the hub.",
    )


def test_the_token_opens_a_gated_adapter(hub):
    status, message = hub.fetch("gated/sql")
    assert (status, message.partition(":")[0]) == (1, "gated/sql is gated")
    assert "HF_TOKEN" in message
    assert hub.fetch("gated/sql", HF_TOKEN="secret")[0] == 0
    assert "Bearer secret" in hub.tokens


def test_what_goes_wrong_is_said_in_one_line(hub):
    assert hub.fetch("nobody/nothing") == (
        1,
        "The hub has no nobody/nothing; check the spelling, or set HF_TOKEN if it is private.",
    )
    assert hub.fetch("good/sql", HF_HUB_OFFLINE="1") == (
        1,
        "good/sql is not in the cache and HF_HUB_OFFLINE is set; unset it to download.",
    )
    status, message = hub.fetch("broken/sql")
    assert (status, message.count("\n")) == (1, 0)
    assert "500" in message
    status, message = hub.fetch("good/sql", HF_ENDPOINT="http://127.0.0.1:9")
    assert (status, message.count("\n")) == (1, 0)
    assert "network" in message


@pytest.mark.parametrize(
    "text", ["", "sql", "a/b/c", "../x", "a/..", "./x", "a b/c", "a/ü", "/x", "x/", "a/b\n"]
)
def test_what_is_no_hub_id_is_never_asked_for(text):
    assert not is_hub_id(text)
    with pytest.raises(AdapterError, match="is no hub id"):
        fetch(text)


PULL = """
import sys
from loramix.cli import main
sys.exit(main(["pull", *sys.argv[1:]]))
"""


def test_a_repository_is_pulled_whole_by_revision(hub, tmp_path):
    status, path = hub.run(PULL, "good/sql", f"--output={tmp_path / 'sql'}")
    assert (status, path) == (0, str(tmp_path / "sql"))
    found = {file.name: file.read_bytes() for file in Path(path).iterdir()}
    assert found == hub.files
    assert hub.run(PULL, "good/sql", f"--output={tmp_path / 'sql'}")[0] == 1
    assert hub.run(PULL, "good/sql", "--revision=v9")[0] == 1
    assert hub.run(PULL, "good/sql", "--revision=v1")[0] == 0
    assert any("/v1" in path for path in hub.asked)
