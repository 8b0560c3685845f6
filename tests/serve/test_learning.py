"""The router of a running server knows what is loaded at once, and is corrected by trace ids."""

from __future__ import annotations

import asyncio
import json
import shutil

import pytest

import loramix as package
from loramix.cli import main
from loramix.formats import peft
from loramix.lm import ROUTER
from loramix.route.gate import GateRouter
from loramix.serve import relearning
from loramix.serve.service import Service
from loramix.serve.training import Training
from tests.serve.front import running
from tests.shop import BANKING
from tests.tiny import random_adapter

POEM = "write a verse about the sea"
POEMS = [f"write a {kind} about {what}" for kind in ("poem", "verse", "rhyme", "sonnet")
         for what in ("love", "rain", "the lake", "my dog", "autumn")]  # fmt: skip


@pytest.fixture
def front(shop, tmp_path):
    shutil.copytree(shop.library, tmp_path / "library")
    with (
        package.open(shop.base, tmp_path / "library") as lm,
        running(Service(lm, roots=(tmp_path,))) as front,
    ):
        peft.write(random_adapter(lm.engine.base.model, "poem", seed=7), tmp_path / "poem")
        yield front


def upload(front, folder, *lines):
    files = [("files", (file.name, file.read_bytes())) for file in sorted(folder.iterdir())]
    if lines:
        files.append(("files", ("examples.jsonl", "\n".join(lines).encode())))
    return front.http.post("/v1/adapters/poem/files", files=files)


def routed(front, text):
    return front.post("/v1/route", text=text).json()


def saved(front):
    return GateRouter.load(front.service.lm.library.folder / ROUTER)


def test_an_adapter_is_routed_to_by_its_queries_once_it_is_uploaded(front, tmp_path):
    assert upload(front, tmp_path / "poem", "{}").status_code == 400
    assert "poem" not in front.service.names()
    lines = [json.dumps({"text": text}) for text in POEMS]
    assert upload(front, tmp_path / "poem", *lines).status_code == 200
    got = routed(front, POEM)
    assert (got["mix"], got["coldness"]) == ("poem", 0)
    assert routed(front, BANKING)["mix"] == "banking"
    assert saved(front).fresh == {"poem"}
    assert front.http.delete("/v1/adapters/poem").status_code == 200
    assert "poem" not in routed(front, POEM)["scores"]
    assert saved(front).adapters == ("banking", "sql")


def test_an_adapter_is_routed_to_by_its_card_and_by_what_it_says_later(front, tmp_path):
    got = front.post("/v1/load_lora_adapter", lora_name="poem", lora_path=str(tmp_path / "poem"))
    assert got.status_code == 200
    assert saved(front).cards == {"poem"}
    front.http.patch("/v1/adapters/poem", json={"skills": ["verses about the sea and sailors"]})
    got = routed(front, "verses about the sea")
    assert (got["mix"], got["coldness"]) == ("poem", 1)


def test_a_router_is_refitted_beside_the_server_and_taken_up(front, tmp_path, monkeypatch):
    upload(front, tmp_path / "poem", *(json.dumps({"text": text}) for text in POEMS))
    service = front.service
    object.__setattr__(service, "training", Training(tmp_path, "", "", service.lm.engine.base))
    monkeypatch.setattr(relearning, "WATCH_S", 0.05)

    async def until_learned():
        keeping = asyncio.create_task(relearning.keep_learned(service))
        async with asyncio.timeout(60):
            while service.lm.router.gate.fresh:
                await asyncio.sleep(0.05)
        keeping.cancel()

    asyncio.run(until_learned())
    assert not saved(front).fresh
    assert routed(front, POEM)["mix"] == "poem"


def test_a_decision_is_corrected_by_its_trace_from_the_command_line(front, capsys):
    trace = routed(front, BANKING)["trace_id"]
    where = ["--server", front.url]
    assert main(["route", "feedback", trace, "--right", "none", *where]) == 0
    id = capsys.readouterr().out.split()[0]
    assert routed(front, BANKING)["mix"] == "base"
    assert main(["route", "feedback", *where, "--json"]) == 0
    assert [c["id"] for c in json.loads(capsys.readouterr().out)["corrections"]] == [id]
    assert main(["route", "feedback", "--undo", id, *where]) == 0
    assert routed(front, BANKING)["mix"] == "banking"
    assert main(["route", "feedback", "unknown", "--right", "none", *where]) == 1
    assert "of late" in capsys.readouterr().err
