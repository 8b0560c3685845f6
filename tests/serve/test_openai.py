"""OpenAI's API as its own client sees it."""

import json

import openai
import pytest

from loramix.engine import Request, Sampling
from loramix.mix import Mix
from loramix.serve.chats import ChatCompletion
from loramix.serve.completions import TextCompletion
from tests.shop import BANKING


@pytest.fixture(scope="session")
def client(front):
    with openai.OpenAI(base_url=f"{front.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def user(text):
    return [{"role": "user", "content": text}]


def offline(front, prompt, mix, max_tokens=8, **options):
    sampling = Sampling(temperature=0, max_tokens=max_tokens, **options)
    return front.service.lm.engine.generate([Request(prompt, Mix.parse(mix), sampling)])[0]


def told(client, **asked):
    """The chunks of a stream, and the first one's text."""
    asked = {"temperature": 0, "max_tokens": 8, "stream": True} | asked
    chunks = list(client.chat.completions.create(**asked))
    return chunks, "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)


MIXES = ("base", "banking", "sql", "banking:0.45+sql:0.55", "sql:-0.5")


@pytest.mark.parametrize("mix", MIXES)
def test_a_completion_is_the_engines_own_answer_under_that_mix(front, client, mix):
    wanted = offline(front, "the cat", mix)
    answer = client.completions.create(model=mix, prompt="the cat", max_tokens=8, temperature=0)
    assert (answer.choices[0].text, answer.model) == (wanted.text, mix)
    assert answer.usage.completion_tokens == wanted.num_tokens
    assert answer.usage.prompt_tokens == wanted.num_prompt_tokens


@pytest.mark.parametrize("mix", MIXES)
def test_a_streamed_chat_says_the_same_as_a_whole_one(client, mix):
    whole = client.chat.completions.create(
        model=mix, messages=user("the cat"), temperature=0, max_tokens=8
    )
    chunks, text = told(client, model=mix, messages=user("the cat"),
                        stream_options={"include_usage": True})  # fmt: skip
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage
    assert {chunk.model for chunk in chunks} == {whole.model} == {mix}


def test_auto_says_what_answered_and_why_and_its_name_replays(front, client):
    asked = {"messages": user(BANKING), "temperature": 0, "max_tokens": 8}
    raw = client.chat.completions.with_raw_response.create(model="auto", **asked)
    answer = raw.parse()
    assert raw.headers["x-loramix-mix"] == answer.model == "banking"
    chosen = answer.loramix
    assert chosen["mix"] == "banking"
    assert chosen["scores"]["banking"] > 0.5 > chosen["none"]
    assert chosen["reasons"]
    assert chosen["trace_id"] == raw.headers["x-request-id"] == answer._request_id
    again = client.chat.completions.create(model=answer.model, **asked)
    assert again.choices[0].message.content == answer.choices[0].message.content
    assert front.chat(BANKING, model="").json()["model"] == "banking"  # auto is the default


@pytest.mark.parametrize(
    "body",
    [
        {"model": "banking:0.25+sql:2"},
        {"model": "base", "mix": {"sql": 2, "banking": 0.25}},
        {"mix": "banking:0.25+sql:2"},
        {"lora": [{"id": 0, "scale": 0.25}, {"name": "sql", "scale": 2}]},
        {"merged_adapters": {"ids": ["sql", "banking"], "weights": [2, 0.25]}},
        {"model": "banking:0.25+sql:2", "mix": {"banking": 0.25, "sql": 2.0, "x": 0}},
        {"model": "base:banking:0.25+sql:2"},
    ],
)
def test_a_mix_can_be_named_in_many_ways(front, body):
    assert front.chat(**body).json()["model"] == "banking:0.25+sql:2"


def test_the_base_is_called_by_its_id_also_with_an_adapter(front):
    base = front.service.lm.engine.base_id
    assert front.chat(model=base).json()["model"] == "base"
    assert front.chat(model=f"{base}:sql").json()["model"] == "sql"
    assert front.chat(model=base, adapter_id="sql").json()["model"] == "sql"


@pytest.mark.parametrize("stream", [False, True])
def test_several_answers_and_a_seed(client, stream):
    asked = {
        "model": "sql",
        "prompt": "the",
        "n": 3,
        "seed": 4,
        "temperature": 1.5,
        "max_tokens": 6,
    }
    texts = []
    for _ in range(2):
        if not stream:
            choices = client.completions.create(**asked).choices
            texts.append([choice.text for choice in choices])
            continue
        parts = {0: "", 1: "", 2: ""}
        for chunk in client.completions.create(**asked, stream=True):
            parts[chunk.choices[0].index] += chunk.choices[0].text
        texts.append(list(parts.values()))
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 1


def test_several_prompts_as_texts_or_tokens(front):
    tokens = [[10, 11, 12], [20, 21]]
    answer = front.complete(tokens, model="sql", n=2).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    for choice, prompt in zip(answer["choices"][::2], tokens, strict=True):
        assert choice["text"] == offline(front, tuple(prompt), "sql").text
    assert answer["usage"]["prompt_tokens"] == 5
    routed = front.complete([BANKING, "list the names of all pupils"], model="auto").json()
    assert [choice["mix"] for choice in routed["choices"]] == ["banking", "sql"]
    assert routed["model"] == "auto"


def test_stop_strings_and_lengths(front):
    said = {mix: offline(front, "the cat", mix, max_tokens=20).text for mix in MIXES}
    mix, whole = max(said.items(), key=lambda item: len(item[1]))
    stop = whole[3:6]
    asked = {"model": mix, "max_tokens": 20}
    answer = front.complete(stop=["never said", stop], **asked).json()["choices"][0]
    assert answer["text"] == whole[: whole.index(stop)]
    assert answer["finish_reason"] == "stop"
    assert front.complete(model=mix, max_tokens=2).json()["choices"][0]["finish_reason"] == "length"


def test_logprobs_of_a_chat(front):
    answer = front.chat("the cat", logprobs=True, top_logprobs=3).json()
    content = answer["choices"][0]["logprobs"]["content"]
    assert len(content) == answer["usage"]["completion_tokens"]
    for own in content:
        assert own["logprob"] == own["top_logprobs"][0]["logprob"] <= 0  # greedy
        assert len(own["top_logprobs"]) == 3


@pytest.mark.parametrize("max_tokens", [0, 3])
def test_echo_with_the_prompts_own_logprobs(front, max_tokens):
    answer = front.complete("the cat sat", echo=True, logprobs=1, max_tokens=max_tokens).json()
    choice = answer["choices"][0]
    assert choice["text"].startswith("the cat sat")
    assert (choice["text"] == "the cat sat") == (max_tokens == 0)
    assert answer["usage"]["completion_tokens"] == max_tokens
    logprobs = choice["logprobs"]
    num = answer["usage"]["prompt_tokens"] + max_tokens
    assert {len(column) for column in logprobs.values()} == {num}
    assert logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
    assert "".join(logprobs["tokens"]).startswith(choice["text"])  # an end token has no text
    score = front.service.lm.engine.score([Request("the")], [" cat sat"])[0]
    told = logprobs["token_logprobs"][1 : answer["usage"]["prompt_tokens"]]
    assert sum(told) == pytest.approx(score, rel=1e-4)


PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 4}, "age": {"enum": [1, 2]}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_follows_a_json_schema(client, stream):
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    asked = {"model": "sql", "messages": user("who?"), "response_format": form, "max_tokens": 60}
    if stream:
        text = told(client, **asked)[1]
    else:
        text = client.chat.completions.create(**asked).choices[0].message.content
    person = json.loads(text)
    assert person.keys() == {"name", "age"}
    assert person["age"] in (1, 2)


def test_models_are_the_base_auto_and_the_adapters(front, client):
    base = front.service.lm.engine.base_id
    listed = {model.id: model for model in client.models.list()}
    assert set(listed) == {base, "auto", "banking", "sql"}
    assert listed["sql"].parent == base
    assert client.models.retrieve("banking:0.5+sql:0.5").id == "banking:0.5+sql:0.5"
    with pytest.raises(openai.NotFoundError, match="Did you mean 'banking'"):
        client.models.retrieve("bankin")


def test_responses_are_as_the_schema_says(front):
    ChatCompletion.model_validate(front.chat(n=2, logprobs=True, top_logprobs=1).json())
    TextCompletion.model_validate(front.complete(n=2, logprobs=2, echo=True).json())


def test_errors_reach_openais_client_as_its_own(client):
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="gpt-4o", messages=user("hi"))
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="base", messages=user("hi"), top_p=2)
    assert (bad.value.param, bad.value.type) == ("top_p", "invalid_request_error")
    with pytest.raises(openai.BadRequestError, match="holds 128 together") as long:
        told(client, model="base", messages=user("hi"), max_tokens=1000)
    assert long.value.code == "context_length_exceeded"
