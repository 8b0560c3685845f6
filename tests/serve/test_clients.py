"""Other people's clients, unmodified; `make clients` runs these."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

import loramix
from loramix.chat import Message
from loramix.engine import Request, Sampling
from loramix.mix import Mix
from loramix.serve.service import Service
from loramix.serve.training import Training
from loramix.store import Store
from tests.serve.clients import MIX
from tests.serve.front import running

HERE = Path(__file__).parent
pytestmark = pytest.mark.clients


@pytest.fixture(scope="module")
def python() -> Path:
    """The interpreter that has the clients."""
    found = Path(os.environ.get("LORAMIX_CLIENTS", HERE.parents[1] / ".venv-clients"), "bin/python")
    assert found.exists(), "the clients are not installed; `make clients` does that"
    return found


@pytest.fixture(scope="module")
def wanted(front):
    """The engine's own answer to the chat that all of them begin."""
    request = Request(
        (Message("user", "the cat"),), Mix.parse(MIX), Sampling(temperature=0, max_tokens=8)
    )
    return front.service.lm.engine.generate([request])[0].text


def run(python, *arguments):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": "none"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [python, *arguments], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def use(python, name, front, shop):
    return json.loads(run(python, HERE / "clients.py", name, front.url, shop.base).splitlines()[-1])


def test_litellm(python, front, shop, wanted):
    got = use(python, "litellm", front, shop)
    assert got["whole"] == got["stream"] == wanted
    assert "No adapter 'nobody'" in got["refused"]


def test_llm(python, front, shop, wanted):
    got = use(python, "llm", front, shop)
    assert got["whole"] == got["stream"] == wanted


def test_lm_eval(python, front, shop, wanted):
    got = use(python, "lm_eval", front, shop)
    engine, mix = front.service.lm.engine, Mix.parse(MIX)
    pairs = [("the cat", " sat"), ("the", " cat on"), ("in a", " hat")]
    scores = engine.score([Request(text, mix) for text, _ in pairs], [more for _, more in pairs])
    assert [score for score, _ in got["scores"]] == pytest.approx(scores, rel=1e-4)
    sampling = Sampling(temperature=0, max_tokens=8)
    text = engine.generate([Request("the cat", mix, sampling)])[0].text
    assert (got["texts"], got["chats"]) == ([text], [wanted])


@pytest.fixture
def whole(shop, tmp_path):
    """A server that keeps conversations and trains, so that no route is a mere refusal."""
    url = f"sqlite:///{tmp_path}/loramix.db"
    with loramix.open(shop.base, shop.library) as lm, Store.open(url) as store:
        training = Training(tmp_path, url, shop.base, lm.engine.base)
        with running(Service(lm, store, training=training)) as front:
            rows = b'{"prompt": "red", "completion": "a colour"}\n' * 3
            front.http.post("/v1/datasets/0/file", files={"file": ("rows.jsonl", rows)})
            yield front


def test_schemathesis_finds_no_500(python, whole):
    """It makes requests, good and bad, of everything the OpenAPI schema says there is."""
    said = run(
        python.with_name("schemathesis"),
        "run",
        f"{whole.url}/openapi.json",
        "--checks=not_a_server_error,content_type_conformance,response_schema_conformance",
        "--max-examples=60",
        "--exclude-method=DELETE",
        "--seed=1",
        "--suppress-health-check=all",
    )
    assert re.search(r"(\d{3,}) generated, \1 passed", said), said[-3000:]
