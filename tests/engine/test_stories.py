"""A real trained model, end to end: the story its author published comes out letter for letter."""

import pytest

from loramix.engine import Request, Sampling
from loramix.engine.local import LocalEngine
from tests.engine.stories import stories_base


@pytest.fixture(scope="module")
def folder(data_dir):
    return data_dir / "tiny_llm_stories260k"


@pytest.fixture(scope="module")
def golden(folder):
    readme = (folder / "stories260K.md").read_text()
    return readme.split("-t 0.0\n")[1].split("\n```")[0]


def test_the_greedy_story_letter_for_letter(folder, golden):
    with LocalEngine(stories_base(folder)) as engine:
        story = tell(engine, (1,), 256)
        rest = tell(engine, (1, *story.tokens[:60]), 196)
    assert story.text == golden
    assert story.tokens[60:] == rest.tokens
    assert golden.endswith(rest.text)
    assert rest.num_cached_tokens == 60


def tell(engine, prompt, max_tokens):
    sampling = Sampling(temperature=0, max_tokens=max_tokens)
    return engine.generate([Request(prompt, sampling=sampling)])[0]
