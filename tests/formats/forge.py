"""A stand-in for the part of the hub's HTTP protocol that a push speaks, on loopback."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path

from tests.served import served

TOKEN = "hf_secretsecretsecret"


@dataclass
class Forge:
    """Repositories by name, large files by digest, and statuses to fail a route with, in turn."""

    url: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    fails: dict[str, list[int]] = field(default_factory=dict)  # by a part of the path
    asked: list[str] = field(default_factory=list)
    commits: int = 0

    def loramix(self, *words: str | Path, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
        """Run a command with the real client of this hub, in a process of its own."""
        return self.python("-m", "loramix", *words, token=token)

    def python(self, *words: str | Path, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
        own = {"HF_ENDPOINT": self.url, "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1"}
        own |= {"HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*", "PYTHONPATH": "src"}
        keep = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}
        return subprocess.run(
            [sys.executable, *map(str, words)],
            env=keep | own | {"HF_DEBUG": "1"},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            timeout=100,
        )

    def answer(self, method: str, path: str, token: str | None, body: bytes) -> tuple[int, object]:
        path = path.partition("?")[0]
        self.asked.append(f"{method} {path}")
        for part, statuses in self.fails.items():
            if part in path and statuses:
                return statuses.pop(0), {"error": "no"}
        if token != f"Bearer {TOKEN}" and not path.startswith("/blob/"):
            return 401, {"error": "Invalid username or password."}
        if path.startswith("/blob/"):
            return self.store(path.removeprefix("/blob/"), body)
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        name = "/".join(path.removeprefix("/api/models/").strip("/").split("/")[:2])
        if path.endswith("/info/lfs/objects/batch"):
            return 200, self.batch(json.loads(body))
        if "/preupload/" in path:
            return 200, {"files": [mode(file) for file in json.loads(body)["files"]]}
        if "/commit/" in path:
            return self.commit(name, body)
        if method == "GET" and name in self.repositories:
            return 200, {"id": name, "private": self.private[name], "siblings": []}
        return 404, {"error": f"{method} {path}"}

    def create(self, asked: dict[str, object]) -> tuple[int, object]:
        name = f"{asked['organization']}/{asked['name']}"
        address = {"url": f"{self.url}/{name}"}
        if name in self.repositories:
            return 409, address | {"error": "You already created this model repo"}
        self.repositories[name] = {}
        private = asked.get("private") or asked.get("visibility") == "private"
        self.private[name] = bool(private)
        return 200, address

    def batch(self, asked: dict[str, list[dict[str, object]]]) -> object:
        """Where each large file goes; nowhere if it is here."""
        objects = []
        for each in asked["objects"]:
            upload = {"upload": {"href": f"{self.url}/blob/{each['oid']}"}}
            objects.append(each | ({} if each["oid"] in self.blobs else {"actions": upload}))
        return {"transfer": "basic", "objects": objects}

    def store(self, digest: str, body: bytes) -> tuple[int, object]:
        if hashlib.sha256(body).hexdigest() != digest:
            return 400, {"error": "not what its digest says"}
        self.blobs[digest] = body
        return 200, {}

    def commit(self, name: str, body: bytes) -> tuple[int, object]:
        lines = [json.loads(line) for line in body.splitlines()]
        new = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                new[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                new[value["path"]] = self.blobs[value["oid"]]
        self.repositories[name] |= new
        self.commits += 1
        address = f"{self.url}/{name}/commit/{self.commits:040d}"
        return 200, {"commitUrl": address, "commitOid": f"{self.commits:040d}", "success": True}


def mode(file: dict[str, object]) -> dict[str, object]:
    """Tensors are large, everything else is not."""
    large = str(file["path"]).endswith((".safetensors", ".gguf"))
    kind = {"uploadMode": "lfs" if large else "regular"}
    return {"path": file["path"], "shouldIgnore": False, "oid": None} | kind


@contextmanager
def running() -> Iterator[Forge]:
    forge = Forge()

    class Handler(BaseHTTPRequestHandler):
        def respond(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            token = self.headers.get("Authorization")
            status, answer = forge.answer(self.command, self.path, token, body)
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            if status == 429:
                self.send_header("Retry-After", "0")
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_HEAD = respond  # noqa: N815

        def log_message(self, *args: object) -> None:
            pass

    with served(Handler) as forge.url:
        yield forge
