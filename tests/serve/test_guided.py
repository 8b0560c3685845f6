"""What settings add to a service: system prompts of adapters, and pages of other origins."""

import pytest

import loramix
from loramix.mix import Mix
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


def test_the_heaviest_adapter_that_has_one_gives_it(guided):
    service = guided.service
    assert service.system_prompt(Mix({"banking": 2, "sql": 0.1})) == "be kind"
    assert service.system_prompt(Mix({"banking": 2})) == ""


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
