"""What a chat template is told, and what it is not told in vain."""

import pytest

from loramix.chat import Call, Message, prompt_ids
from loramix.errors import BadRequest
from tests.tiny import tiny_tokenizer

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
TEMPLATE = (
    "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}({{ c.function.name }} {{ c.function.arguments.x }})"
    "{% endfor %}{{ m.tool_call_id or '' }}{% endfor %}"
    "{% if not enable_thinking %}<quick>{% endif %}"
)
TURNS = (
    Message("user", "1+1"),
    Message("assistant", "", (Call("add", '{"x": 1}', "c1"),)),
    Message("tool", "2", call_id="c1"),
)


def test_tools_calls_and_their_answers_reach_the_template():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    told = {"tools": TOOLS, "enable_thinking": False}
    text = tokenizer.decode(prompt_ids(tokenizer, TURNS, told))
    assert text == "[add]<user>1+1<assistant>(add 1)<tool>2c1<quick>"


@pytest.mark.parametrize(
    ("messages", "told", "named"),
    [
        (TURNS[:1], {"tools": TOOLS}, "'tools'"),
        (TURNS, {}, "'tools'"),
        (TURNS[:1], {"enable_thinking": True}, "'enable_thinking'"),
    ],
)
def test_what_the_template_would_pass_over_is_refused(messages, told, named):
    with pytest.raises(BadRequest, match=named):
        prompt_ids(tiny_tokenizer(), messages, told)


def test_a_tokenizer_without_a_template_is_told_nothing():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    assert prompt_ids(tokenizer, TURNS[:1]) == tokenizer("1+1")["input_ids"]
    with pytest.raises(BadRequest, match="'enable_thinking'"):
        prompt_ids(tokenizer, TURNS[:1], {"enable_thinking": False})
