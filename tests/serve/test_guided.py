"""What settings add to a service: system prompts of adapters, and pages of other origins."""

import json
import shutil

import pytest

import loramix
from loramix.library import Library
from loramix.lm import LM
from loramix.serve.service import Service
from tests.serve.front import running

KIND = {"role": "system", "content": "be kind"}
HI = {"role": "user", "content": "hi"}


@pytest.fixture(scope="module")
def guided(shop):
    with loramix.open(shop.base, shop.library) as lm:
        service = Service(lm, system_prompts={"sql": "be kind"}, cors=("http://page",))
        with running(service) as front:
            yield front


def usage(front, **body):
    return front.chat(**body).json()["usage"]["prompt_tokens"]


def test_a_chat_that_brings_no_system_message_gets_its_adapters(guided):
    said = usage(guided, model="sql", messages=[KIND, HI])
    assert usage(guided, model="sql", messages=[HI]) == said
    assert usage(guided, model="sql:0.6+banking:0.5", messages=[HI]) == said
    bare = usage(guided, model="banking", messages=[HI])
    assert bare < said
    assert usage(guided, model="base", messages=[HI]) == bare


def test_one_that_brings_a_system_message_keeps_it(guided):
    own = [{"role": "system", "content": "be very brief"}, HI]
    assert usage(guided, model="sql", messages=own) == usage(guided, model="banking", messages=own)


def test_an_adapters_prompt_is_changed_while_it_runs(guided, shop, tmp_path):
    shelf = Library(shutil.copytree(shop.library, tmp_path / "library"))
    with LM(guided.service.lm.engine, shelf) as lm, running(Service(lm)) as front:
        bare = usage(front, model="sql", messages=[HI])
        patch = {"system_prompt": "be kind"}
        assert front.http.patch("/v1/adapters/sql", json=patch).json().items() >= patch.items()
        said = usage(front, model="base", messages=[KIND, HI])
        for model in ("sql", "sql:0.5", "banking:0.2+sql:0.4"):
            assert usage(front, model=model, messages=[HI]) == said > bare
        own = [{"role": "system", "content": "x"}, HI]
        assert usage(front, model="sql", messages=own) == usage(front, model="base", messages=own)
        assert shelf.card("sql").system_prompt == "be kind"  # and so after a restart
        front.http.patch("/v1/adapters/sql", json={"system_prompt": ""})
        assert usage(front, model="sql", messages=[HI]) == bare
        (shelf.folder / "sql" / "card.json").write_text("{")
        got = front.chat(model="sql")
        assert (got.status_code, "card.json" in got.text) == (500, True)


@pytest.mark.parametrize(
    ("patch", "says"),
    [
        ({"system_prompt": "x"}, "The settings say the system_prompt of 'sql'"),
        ({"system_prompt": "a\0b"}, "The settings say"),
        ({"system_prompt": 3}, "valid string"),
        ({"description": "a\ud800b"}, "surrogates not allowed"),
        ({"skills": ["\udcff"]}, "surrogates not allowed"),
        ({"weight": float("nan")}, "finite number"),
        ({"weight": float("inf")}, "finite number"),
    ],
)
def test_a_patch_that_cannot_be_leaves_the_card(guided, patch, says):
    before = guided.http.get("/v1/adapters/sql").json()
    assert before["system_prompt"] == "be kind"  # the settings'
    raw = json.dumps(patch)
    headers = {"content-type": "application/json"}
    got = guided.http.patch("/v1/adapters/sql", content=raw, headers=headers)
    assert (got.status_code, says in got.json()["error"]["message"]) == (400, True), got.text
    assert guided.http.get("/v1/adapters/sql").json() == before


def test_a_prompt_that_no_chat_could_begin_with_is_refused(guided):
    for prompt in ("a\0b", " "):
        got = guided.http.patch("/v1/adapters/banking", json={"system_prompt": prompt})
        assert got.status_code == 400, got.text


def test_only_named_origins_may_call(guided):
    for origin, allowed in (("http://page", "http://page"), ("http://other", None)):
        answer = guided.http.get("/v1/models", headers={"Origin": origin})
        assert answer.headers.get("access-control-allow-origin") == allowed


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "evil.example:8000"}, 403),
        ({"Host": "evil.example", "Origin": "http://evil.example"}, 403),
        ({"Origin": "http://page"}, 200),
        ({"Origin": "http://localhost:8000"}, 200),
        ({"Origin": "http://127.0.0.1:3"}, 200),
        ({"Host": "[::1]:8000"}, 200),
        ({}, 200),
    ],
)
def test_without_keys_pages_of_other_sites_are_refused(guided, headers, status):
    assert guided.http.get("/v1/adapters", headers=headers).status_code == status
