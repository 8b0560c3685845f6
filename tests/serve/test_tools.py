"""Calls of tools, read from what models write."""

import json

import openai
import pytest

from loramix.chat import Call
from loramix.engine.local import LocalEngine
from loramix.library import Library
from loramix.lm import LM
from loramix.serve.service import Service
from loramix.serve.tools import CallReader
from tests.serve.front import running
from tests.tiny import tiny_base

HERMES = '<tool_call>\n{"name": "add", "arguments": {"x": 1}}\n</tool_call>'
LLAMA = '{"name": "add", "parameters": {"x": 1}}'


def read(text, size=3):
    """What is shown as it comes, what is left at the end, and the calls."""
    reader = CallReader(["add", "sub"])
    shown = [reader.push(text[at : at + size]) for at in range(0, len(text), size)]
    rest, calls = reader.flush()
    return "".join(shown), rest, [(call.name, json.loads(call.arguments)) for call in calls]


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    ("text", "said", "calls"),
    [
        (HERMES, "", [("add", {"x": 1})]),
        (f"Let me see. {HERMES}", "Let me see. ", [("add", {"x": 1})]),
        (HERMES + "\n" + HERMES.replace("add", "sub"), "", [("add", {"x": 1}), ("sub", {"x": 1})]),
        (HERMES.removesuffix("</tool_call>"), "", [("add", {"x": 1})]),
        (LLAMA, "", [("add", {"x": 1})]),
        (f"<|python_tag|>{LLAMA}", "", [("add", {"x": 1})]),
        (f"[TOOL_CALLS][{LLAMA}, {LLAMA}]", "", [("add", {"x": 1})] * 2),
        ('{"name": "add"}', "", [("add", {})]),
        ("1 < 2 <tool", "1 < 2 <tool", []),
        ('{"name": "other", "arguments": {}}', '{"name": "other", "arguments": {}}', []),
        ('{"name": "add", "arguments": "x"}', '{"name": "add", "arguments": "x"}', []),
        ("<tool_call>{broken</tool_call> so", "<tool_call>{broken</tool_call> so", []),
        ("[1, 2] are numbers", "[1, 2] are numbers", []),
    ],
)
def test_calls_are_read_and_all_else_is_text(text, said, calls, size):
    shown, rest, found = read(text, size)
    assert (shown + rest, found) == (said, calls)


def test_text_is_shown_as_it_comes_where_no_call_begins():
    assert read("It is two.")[:2] == ("It is two.", "")


def test_without_tools_everything_is_text():
    reader = CallReader([])
    assert reader.push(LLAMA) == LLAMA
    assert reader.flush() == ("", ())


TEMPLATE = (
    "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ m.tool_calls or '' }}{% endfor %}"
)
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {
            "type": "object",
            "properties": {"x": {"enum": [1, 2]}},
            "required": ["x"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    base = tiny_base(max_position_embeddings=512)
    base.tokenizer.chat_template = TEMPLATE
    library = Library(tmp_path_factory.mktemp("library"))
    with (
        LM(LocalEngine(base), library) as lm,
        running(Service(lm)) as front,
        openai.OpenAI(base_url=f"{front.url}/v1", api_key="none") as client,
    ):
        yield client


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}])
@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_has_to_be_made_is_made_and_can_be_answered(client, choice, stream):
    messages = [{"role": "user", "content": "1+1?"}]
    asked = {"model": "base", "tools": [ADD], "tool_choice": choice, "max_tokens": 60}
    if stream:
        with client.chat.completions.stream(messages=messages, **asked) as events:
            answer = events.get_final_completion().choices[0]
    else:
        answer = client.chat.completions.create(messages=messages, **asked).choices[0]
    assert answer.finish_reason == "tool_calls"
    assert answer.message.content is None
    (call,) = answer.message.tool_calls
    assert call.function.name == "add"
    assert json.loads(call.function.arguments)["x"] in (1, 2)
    told = {"role": "tool", "content": "2", "tool_call_id": call.id}
    again = answer.message.model_dump(exclude={"parsed"} if stream else None)
    for each in again["tool_calls"]:
        each["function"].pop("parsed_arguments", None)
    messages += [again, told]
    after = client.chat.completions.create(
        model="base", messages=messages, tools=[ADD], tool_choice="none", max_tokens=4
    )
    assert after.choices[0].message.tool_calls is None


def test_a_calls_id_is_its_own():
    reader = CallReader(["add"])
    reader.push(f"[{LLAMA}, {LLAMA}]")
    first, second = reader.flush()[1]
    assert isinstance(first, Call)
    assert first.id != second.id
