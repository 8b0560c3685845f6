"""What cannot be done is refused with its status, and a sentence that helps."""

import json
import math

import pytest

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = {"id": "c", "type": "function", "function": {"name": "add", "arguments": "{}"}}


def chat(**body):
    return CHAT, {"model": "base", "messages": HI} | body


def text(**body):
    return TEXT, {"model": "base", "prompt": "hi"} | body


def route(**body):
    return "/v1/route", body


def turns(*messages):
    return chat(messages=list(messages))


def turn(role, content="hi", **more):
    return {"role": role, "content": content} | more


def form(schema):
    return chat(response_format={"type": "json_schema", "json_schema": schema})


BAD = [
    # trainings: the rest is in test_jobs.py and test_datasets.py
    (("/v1/jobs", {}), 400, "config: field required"),
    (("/v1/jobs", {"config": []}), 400, "config"),
    (("/v1/jobs", {"config": {}, "wait": True}), 400, "wait"),
    (("/v1/jobs", {"config": {"name": "x"}}), 400, "does not train"),
    (("/v1/jobs/x/stop", {}), 400, "keeps nothing"),
    (("/v1/datasets/x/file", {}), 400, "does not train"),
    # which mix
    (chat(model="nobody"), 404, "No adapter 'nobody'"),
    (chat(model="bankin"), 404, "Did you mean 'banking'"),
    (chat(model="gpt-4o"), 404, "No adapter 'gpt-4o'"),
    (chat(model="Meta/Llama-3"), 404, "No adapter 'Meta/Llama-3'"),
    (chat(model="base:nobody"), 404, "No adapter 'nobody'"),
    (chat(model="sql:0.5++banking"), 400, "cannot name an adapter"),
    (chat(model="sql:much"), 400, "Expected 'adapter:weight'"),
    (chat(model="sql+sql"), 400, "appears twice"),
    (chat(model="sql:1e999"), 400, "Expected 'adapter:weight'"),
    (chat(model=7), 400, "model: input should be a valid string"),
    (chat(model="sql", mix={"banking": 1}), 400, "different mixes: mix says 'banking', model says"),
    (chat(model="auto", mix={"banking": 1}), 400, "different mixes"),
    (chat(mix={"sql": 1}, lora=[{"id": 0, "scale": 1}]), 400, "lora says 'banking'"),
    (chat(mix={"sql": 1}, adapter_id="banking"), 400, "different mixes"),
    (chat(mix={"nobody": 1}), 404, "No adapter 'nobody'"),
    (chat(mix={"SQL": 1}), 400, "cannot name an adapter"),
    (chat(mix={"sql": "1"}), 400, "mix"),
    (chat(mix={"sql": True}), 400, "mix"),
    (chat(mix=[1]), 400, "mix"),
    (chat(lora=[{"id": 9, "scale": 1}]), 400, "id 9, which no adapter has"),
    (chat(lora=[{"id": -1}]), 400, "id -1"),
    (chat(lora=[{"scale": 1}]), 400, "needs an id or a name"),
    (chat(lora=[{"id": 0, "name": "sql"}]), 400, "needs an id or a name"),
    (chat(lora=[{"id": 0}, {"name": "banking"}]), 400, "'banking' twice"),
    (chat(lora=[{"id": 0, "sacle": 1}]), 400, "did you mean 'scale'"),
    (chat(lora={"id": 0}), 400, "lora"),
    (chat(adapter_id="nobody"), 404, "No adapter 'nobody'"),
    (chat(adapter_source="hub", adapter_id="sql"), 400, "adapter_source: input should be 'local'"),
    (chat(adapter_source="local"), 400, "without adapter_id"),
    (chat(merged_adapters={"ids": ["sql"], "weights": []}), 400, "one weight for each id"),
    (chat(merged_adapters={"ids": ["sql", "sql"], "weights": [1, 1]}), 400, "each id once"),
    (
        chat(merged_adapters={"ids": ["sql"], "weights": [1], "merge_strategy": "ties"}),
        400,
        "input should be 'linear'",
    ),
    # sampling
    (chat(temperature=-1), 400, "temperature is -1"),
    (chat(temperature="0"), 400, "temperature: input should be a valid number"),
    (chat(temperature=True), 400, "temperature"),
    (chat(top_p=0), 400, "top_p is 0"),
    (chat(top_p=1.5), 400, "top_p is 1.5"),
    (chat(top_k=0), 400, "top_k is 0"),
    (chat(top_k=1.5), 400, "top_k"),
    (chat(min_p=2), 400, "min_p is 2"),
    (chat(repetition_penalty=0), 400, "repetition_penalty is 0"),
    (chat(presence_penalty=1000), 400, "presence_penalty is 1000"),
    (chat(frequency_penalty=-1000), 400, "frequency_penalty is -1000"),
    (chat(logit_bias={"x": 1}), 400, "by token id"),
    (chat(logit_bias={"999999": 1}), 400, "logit_bias is not among 0 to"),
    (chat(logit_bias={"5": 5000}), 400, "logit_bias of 5"),
    (chat(seed=1 << 70), 400, "seed is"),
    (chat(seed=0.5), 400, "seed"),
    (chat(stop=""), 400, "stop string is empty"),
    (chat(stop=["a", 1]), 400, "stop"),
    (chat(max_tokens=0), 400, "max_tokens is 0"),
    (chat(max_tokens=-5), 400, "max_tokens is -5"),
    (chat(max_tokens=100000), 400, "shorten the prompt or lower max_tokens"),
    (chat(max_tokens=5, max_completion_tokens=6), 400, "another name of max_completion_tokens"),
    (chat(n=0), 400, "n is 0"),
    (chat(n=1000), 400, "expected 16 at most"),
    (chat(n=2.5), 400, "n: "),
    (chat(logprobs=5), 400, "logprobs"),
    (chat(top_logprobs=5), 400, "send logprobs: true too"),
    (chat(logprobs=True, top_logprobs=100), 400, "logprobs is 100"),
    # what there is not
    (chat(temprature=0), 400, "did you mean 'temperature'"),
    (chat(best_of=2), 400, "Unknown parameter 'best_of'"),
    (chat(functions=[]), 400, "functions is not supported here; leave it out"),
    (chat(function_call="auto"), 400, "function_call is not supported"),
    (chat(audio={}), 400, "audio is not supported"),
    (chat(modalities=["text", "audio"]), 400, "modalities.1: input should be 'text'"),
    (chat(store=True), 400, "store: input should be False"),
    (chat(service_tier="flex"), 400, "service_tier"),
    (chat(reasoning_effort="high"), 400, "reasoning_effort is not supported"),
    (chat(parallel_tool_calls=False), 400, "parallel_tool_calls"),
    (chat(web_search_options={}), 400, "web_search_options is not supported"),
    (chat(stream_options={"include_usage": True}), 400, "stream_options is for streams"),
    (chat(stream=True, stream_options={"usage": True}), 400, "Unknown parameter"),
    (chat(stream="yes"), 400, "stream: input should be a valid boolean"),
    # messages
    ((CHAT, {"model": "base"}), 400, "messages: field required"),
    (chat(messages=[]), 400, "must end with a user's message"),
    (chat(messages="hi"), 400, "messages: input should be a valid list"),
    (turns(turn("user"), turn("assistant")), 400, "must end with a user's message"),
    (turns(turn("system")), 400, "must end with a user's message"),
    (turns(turn("robot")), 400, "messages.0"),
    (turns({"content": "hi"}), 400, "messages.0"),
    (turns(turn("user", "")), 400, "The text is empty"),
    (turns(turn("user", "a\u0000b")), 400, "U+0000 at position 1"),
    (turns(turn("user", "a\ud800b")), 400, "U+D800"),
    (turns(turn("user", None)), 400, "messages.0.content"),
    (turns(turn("user", [{"type": "image_url", "image_url": {"url": "x"}}])), 400, "messages.0"),
    (turns(turn("user", name="bob")), 400, "name is not supported"),
    (turns(turn("user"), turn("tool", tool_call_id="c")), 400, "knows nothing of 'tools'"),
    (turns(turn("tool", tool_call_id="c")), 400, "needs a user's message"),
    (turns(turn("user"), turn("tool")), 400, "tool_call_id: field required"),
    (turns(turn("assistant", tool_calls=[CALL]), turn("user")), 400, "knows nothing of 'tools'"),
    (
        turns(
            turn("assistant", tool_calls=[CALL | {"function": {"name": "a", "arguments": "x"}}]),
            turn("user"),
        ),
        400,
        "must be a JSON object",
    ),
    (chat(messages=[turn("user", "long " * 100)]), 400, "shorten the prompt"),
    # tools and forms
    (chat(tools=[TOOL]), 400, "knows nothing of 'tools'"),
    (chat(tools=[{"type": "code"}]), 400, "tools.0"),
    (chat(tool_choice="required"), 400, "tool_choice is said without tools"),
    (chat(tools=[TOOL], tool_choice="perhaps"), 400, "tool_choice"),
    (
        chat(tools=[TOOL], tool_choice={"type": "function", "function": {"name": "sub"}}),
        400,
        "not among the tools",
    ),
    (chat(enable_thinking=True), 400, "knows nothing of 'enable_thinking'"),
    (chat(chat_template_kwargs={"mood": 1}), 400, "knows nothing of 'mood'"),
    (chat(chat_template_kwargs={"messages": []}), 400, "not for 'messages'"),
    (
        chat(enable_thinking=True, chat_template_kwargs={"enable_thinking": False}),
        400,
        "said twice, and differently",
    ),
    (chat(response_format={"type": "xml"}), 400, "response_format.type"),
    (chat(response_format={"type": "json_schema"}), 400, "json_schema goes with type"),
    (form({"name": "x"}), 400, "schema"),
    (form({"name": "x", "schema": {"type": "nonsense"}}), 400, "schema cannot be followed"),
    (form({"name": "x", "schema": {"$ref": "#/nowhere"}}), 400, "schema cannot be followed"),
    # completions
    ((TEXT, {"model": "base"}), 400, "prompt: field required"),
    (text(prompt=""), 400, "prompt is empty"),
    (text(prompt=[]), 400, "prompt is empty"),
    (text(prompt=[[]]), 400, "prompt is empty"),
    (text(prompt=["a", 1]), 400, "prompt"),
    (text(prompt=[1, 999999]), 400, "token of the prompt is not"),
    (text(prompt=[-1]), 400, "token of the prompt is not"),
    (text(prompt=["x"] * 17), 400, "expected 16 at most"),
    (text(prompt=["x"] * 6, n=3), 400, "expected 16 at most"),
    (text(best_of=3), 400, "best_of is 3; expected n"),
    (text(suffix="x"), 400, "suffix is not supported"),
    (text(logprobs=True), 400, "logprobs"),
    (text(logprobs=21), 400, "logprobs is 21"),
    (text(max_tokens=0), 400, "max_tokens is 0"),
    (text(messages=HI), 400, "Unknown parameter 'messages'"),
    # routes
    (route(), 400, "Send text or messages"),
    (route(text="a", messages=HI), 400, "not both"),
    (route(text=""), 400, "The text is empty"),
    (route(text=[]), 400, "text: input should be a valid string"),
    # adapters
    (("/lora-adapters", [{"id": 7, "scale": 1}]), 400, "id 7, which no adapter has"),
    (("/lora-adapters", {"id": 0}), 400, "valid list"),
    (("/v1/load_lora_adapter", {"lora_name": "x"}), 400, "must be provided"),
    (("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "/etc"}), 400, "roots"),
    (("/v1/load_lora_adapter", {"lora_name": "sql", "lora_path": "x"}), 400, "already been loaded"),
    (("/v1/unload_lora_adapter", {}), 400, "needs to be provided"),
    (("/v1/unload_lora_adapter", {"lora_name": "x"}), 404, "cannot be found"),
    # names of another place
    (chat(best_of=1), 400, "Unknown parameter 'best_of'; leave it out."),
    (("/v1/load_lora_adapter?lora_name=x", {}), 400, "lora_name is no parameter of this query"),
    (("/v1/adapters/x/files?replce=true", {}), 400, "did you mean 'replace'?"),
    # nothing there
    (("/v1/embeddings", {}), 404, "There is no /v1/embeddings here"),
    (("/v1/models", {}), 405, "cannot be asked by POST"),
]


def test_the_table_is_long():
    assert len(BAD) >= 80


@pytest.mark.parametrize(("asked", "status", "says"), BAD, ids=[f"{s}-{t}" for _, s, t in BAD])
def test_a_bad_request_gets_its_status_and_a_sentence_that_helps(front, asked, status, says):
    path, body = asked
    raw = json.dumps(body)
    got = front.http.post(path, content=raw, headers={"content-type": "application/json"})
    error = got.json()["error"]
    assert (got.status_code, says in error["message"]) == (status, True), error
    assert error.keys() == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]
    assert len(error["message"]) < 400


RAW = [
    (b"{", "no JSON"),
    (b"", "body"),
    (b"[]", "body"),
    (b'"hi"', "body"),
    (b"\xff\xfe", "no JSON"),
    (b"[" * 100_000, "no JSON"),
    (json.dumps({"messages": HI, "temperature": math.nan}).encode(), "temperature is nan"),
    (json.dumps({"messages": HI, "mix": {"sql": math.inf}}).encode(), "must be finite"),
]


@pytest.mark.parametrize(("raw", "says"), RAW, ids=[says for _, says in RAW])
def test_a_body_that_cannot_be_read_is_a_bad_request(front, raw, says):
    got = front.http.post(CHAT, content=raw, headers={"content-type": "application/json"})
    assert (got.status_code, says in got.json()["error"]["message"]) == (400, True), got.text


def test_a_body_that_is_too_large_is_not_read(front):
    limit = front.service.limits.body_bytes
    declared = front.http.post(CHAT, content=b" " * (limit + 1))
    chunked = front.http.post(
        CHAT,
        content=iter([b" " * (limit // 2)] * 3),
        headers={"content-type": "application/json"},
    )
    for got in (declared, chunked):
        assert (got.status_code, "too large" in got.json()["error"]["message"]) == (413, True)


def test_a_text_is_not_taken_for_json(front):
    raw = json.dumps(chat()[1])
    got = front.http.post(CHAT, content=raw, headers={"content-type": "text/plain"})
    assert got.status_code == 400  # so a web page cannot send one without asking first
    assert "application/json" in got.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/conversations?before=1", "/v1/models?limit=1"])
def test_a_parameter_of_the_query_that_a_route_does_not_have_is_named(front, path):
    error = front.http.get(path).json()["error"]
    assert error["param"] in path
    assert "no parameter of this query" in error["message"]
