"""A base whose template knows of thinking: every surface turns it on, off, or leaves it open."""

import pytest

from loramix.engine.local import LocalEngine
from loramix.library import Library
from loramix.lm import LM
from loramix.serve.service import Service
from loramix.store import Store
from tests.serve.front import running
from tests.tiny import tiny_base

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if enable_thinking is defined %}{{ 'yes, think' if enable_thinking else 'no' }}{% endif %}"
)


@pytest.fixture(scope="module")
def front(tmp_path_factory):
    place = tmp_path_factory.mktemp("thinking")
    base = tiny_base(max_position_embeddings=512)
    base.tokenizer.chat_template = TEMPLATE
    with (
        LM(LocalEngine(base), Library(place / "library")) as lm,
        Store.open(f"sqlite:///{place}/loramix.db") as store,
        running(Service(lm, store)) as front,
    ):
        yield front


def chat(front, **said):
    return front.chat("hi", max_tokens=1, **said).json()["usage"]["prompt_tokens"]


def template(front, **said):
    return chat(front, **({"chat_template_kwargs": said} if said else {}))


def turn(front, **said):
    id = front.post("/v1/conversations").json()["id"]
    asked = {"content": "hi", "max_tokens": 1, **said}
    return front.post(f"/v1/conversations/{id}/turns", **asked).json()["turns"][1]["prompt_tokens"]


def workflow(front, **said):
    given = {"prompt": "hi", "max_tokens": 1, **said}
    got = front.post("/api/workflows/runs", workflow_id="base", input=given, output_only=True)
    return got.json()["usage"]["prompt_tokens"]


@pytest.mark.parametrize("way", [chat, template, turn, workflow])
def test_what_is_said_of_thinking_reaches_the_template(front, way):
    open_, on, off = way(front), way(front, enable_thinking=True), way(front, enable_thinking=False)
    assert open_ < off < on
