import asyncio

import pytest

from loramix.chat import Message
from loramix.engine import Request, Sampling
from loramix.engine.fake import FakeEngine
from loramix.errors import BadRequest
from loramix.mix import Mix

MIX = Mix({"a": 0.5})
PROMPTS = [(Message("user", "no"), Message("user", "one two")), "one two", (1, 2)]


@pytest.mark.parametrize(
    ("prompt", "text"), [*zip(PROMPTS, ["one two", "one two", "2"], strict=True)]
)
def test_it_says_the_mix_and_the_last_message(prompt, text):
    assert FakeEngine().generate([Request(prompt, MIX)])[0].text == f"a:0.5: {text}"


@pytest.mark.parametrize("limit", [1, 2, 3, 9])
def test_a_stream_is_the_answer_in_words(limit):
    async def chunks(request):
        return [chunk async for chunk in FakeEngine().stream(request)]

    request = Request("one two", MIX, Sampling(max_tokens=limit))
    answer = FakeEngine().generate([request])[0]
    parts = asyncio.run(chunks(request))
    assert "".join(chunk.text for chunk in parts) == answer.text
    assert sum(chunk.num_tokens for chunk in parts) == answer.num_tokens == min(limit, 3)
    assert parts[-1].finish == answer.finish == ("stop" if limit >= 3 else "length")
    assert parts[-1].num_prompt_tokens == answer.num_prompt_tokens


def test_its_own_answer_scores_best():
    engine, request = FakeEngine(), Request("one two", MIX)
    assert engine.score([request] * 3, ["a:0.5: one two", "a:0.5: one", "b: one no"]) == [0, 0, -2]


def test_nothing_to_say_is_refused():
    with pytest.raises(BadRequest):
        FakeEngine().generate([Request("")])
