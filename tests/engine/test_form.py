"""Answers that follow a JSON schema, whatever the model would rather say."""

import json

import pytest

from loramix.engine import Request, Sampling
from loramix.engine.local import LocalEngine
from loramix.errors import BadRequest
from loramix.mix import Mix
from tests.tiny import random_adapter, tiny_base

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "mood": {"enum": ["glad", "sad"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "mood", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def engine():
    base = tiny_base()
    with LocalEngine(base, [random_adapter(base.model, "a", seed=1)]) as engine:
        yield engine


def asked(schema, mix="base", **options):
    options = {"temperature": 0, "max_tokens": 100} | options
    return Request("hi", Mix.parse(mix), Sampling(schema=json.dumps(schema), **options))


@pytest.mark.parametrize("temperature", [0, 2])
def test_answers_of_any_mix_follow_their_schema_side_by_side(engine, temperature):
    requests = [asked(PERSON, mix, temperature=temperature, seed=1) for mix in ("base", "a", "a:2")]
    plain = Request("hi", Mix(), Sampling(temperature=0, max_tokens=10))
    alone = engine.generate([plain])[0].tokens
    *answers, beside = engine.generate([*requests, plain])
    assert beside.tokens == alone
    for answer in answers:
        person = json.loads(answer.text)
        assert answer.finish == "stop"
        assert set(person) == {"name", "mood", "age"}
        assert person["mood"] in ("glad", "sad")
        assert 0 <= person["age"] <= 120
        assert len(person["name"]) <= 5


def test_each_of_several_answers_has_a_form_of_its_own(engine):
    answers = engine.generate([Request("hi", n=3, sampling=asked({"enum": [1, "b"]}).sampling)])
    assert {json.loads(answer.text) for answer in answers} <= {1, "b"}


@pytest.mark.parametrize("schema", ['{"type":"nonsense"}', "[]", "no json", '{"$ref":"#/nowhere"}'])
def test_what_is_no_schema_is_a_bad_request(engine, schema):
    with pytest.raises(BadRequest, match="JSON schema cannot be followed"):
        engine.generate([Request("hi", sampling=Sampling(schema=schema, fit=True))])


def test_a_schema_needs_a_base_that_ends_its_answers():
    base = tiny_base()
    base.model.generation_config.eos_token_id = None
    with LocalEngine(base) as engine, pytest.raises(BadRequest, match="no end token"):
        engine.generate([asked({"type": "object"})])
