from __future__ import annotations

import asyncio
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

import loramix
from loramix.chat import Message
from loramix.engine import Sampling
from loramix.engine.fake import FakeEngine
from loramix.errors import BadRequest, MixSyntaxError, RouteError, UnknownAdapter
from loramix.folders import default_library, own_library
from loramix.formats.card import write_card
from loramix.library import Library
from loramix.lm import LM, Conversation, guided
from loramix.mix import Mix
from loramix.route import Decision
from tests.shop import BANKING, SQL, Shop

GREEDY = Sampling(temperature=0, max_tokens=8)


class WordRouter:
    """Sends what says "card" to banking and the rest nowhere."""

    adapters = ("banking", "sql")

    def route(self, messages: Sequence[Message]) -> Decision:
        hit = "card" in messages[-1].content
        mix = Mix({"banking": 0.9}) if hit else Mix()
        return Decision(mix, {"banking": 0.9 * hit, "sql": 0.05}, 1 - 0.9 * hit, ("card",), 0.5)

    def scores(self, queries: Sequence[str]) -> list[list[float]]:
        return [[float("card" in query), 0.0] for query in queries]


@pytest.fixture
def faked(shop: Shop) -> LM:
    return LM(FakeEngine(), Library(Path(shop.library)), WordRouter())


@pytest.fixture(scope="module")
def lm(shop: Shop):
    with loramix.open(shop.base, shop.library) as opened:
        yield opened


def test_a_reply_says_what_answered_and_why(faked):
    reply = faked.ask("my card?")
    assert reply.mix == Mix({"banking": 0.9})
    assert (reply.scores, reply.none) == ({"banking": 0.9, "sql": 0.05}, pytest.approx(0.1))
    assert reply.reasons == ("card",)
    assert str(reply.mix) in reply.text


@pytest.mark.parametrize(
    ("mix", "said"),
    [("base", ""), ("a", "be a"), ("c", ""), ("a:0.4+b:0.6", "be b"), ("a:-0.7+b:0.6", "be a"),
     ("a:0.1+c:2", "be a")],
)  # fmt: skip
def test_a_conversation_begins_with_the_system_prompt_of_its_heaviest_adapter(mix, said):
    asked = (Message("user", "hi"),)
    system = (Message("system", said),) if said else ()
    prompts = {"a": "be a", "b": "be b", "c": ""}
    assert guided(asked, Mix.parse(mix), prompts.__getitem__) == system + asked
    own = (Message("system", "be me"), *asked)
    assert guided(own, Mix.parse(mix), prompts.__getitem__) == own


def test_asking_begins_with_what_the_card_says(lm, shop, tmp_path):
    shelf = Library(shutil.copytree(shop.library, tmp_path / "library"))
    own = LM(lm.engine, shelf)
    bare = own.ask("hi", "sql", sampling=GREEDY).usage.prompt_tokens
    write_card(replace(shelf.card("sql"), system_prompt="be kind"), shelf.path("sql"))
    kind = (Message("system", "be kind"), Message("user", "hi"))
    wanted = own.ask(kind, "sql", sampling=GREEDY)
    assert own.ask("hi", "sql", sampling=GREEDY).text == wanted.text
    assert own.ask("hi", "sql", sampling=GREEDY).usage == wanted.usage
    assert own.ask("hi", "banking", sampling=GREEDY).usage.prompt_tokens == bare


def test_a_chosen_mix_is_not_second_guessed(faked):
    for mix in ("sql:0.5", Mix({"sql": 0.5})):
        reply = faked.ask("my card?", mix=mix)
        assert (reply.mix, reply.scores, reply.none) == (Mix({"sql": 0.5}), {}, None)
    assert faked.ask("my card?", mix="base").mix == Mix()


def test_adapters_are_read_when_first_named(lm, shop):
    with loramix.open(shop.base, shop.library) as fresh:
        assert fresh.engine.adapters == ()
        fresh.ask(SQL, "sql", sampling=GREEDY)
        assert fresh.engine.adapters == ("sql",)


def test_the_mix_sent_back_gives_the_same_answer(lm):
    first = lm.ask(BANKING, sampling=GREEDY)
    assert "banking" in first.mix
    again = lm.ask(BANKING, mix=str(first.mix), sampling=GREEDY)
    assert (again.text, again.mix) == (first.text, first.mix)
    assert lm.ask(BANKING, sampling=GREEDY).mix == first.mix


def test_a_batch_routes_each_prompt_by_itself(lm):
    banking, sql = lm.ask_all([BANKING, SQL], sampling=GREEDY)
    assert max(banking.mix, key=banking.mix.get) == "banking"
    assert max(sql.mix, key=sql.mix.get) == "sql"
    assert lm.ask_all([], sampling=GREEDY) == []


def test_a_stream_is_the_answer_in_pieces(lm):
    whole = lm.ask(SQL, "sql:0.7", sampling=GREEDY)
    stream = lm.stream(SQL, "sql:0.7", sampling=GREEDY)
    assert stream.mix == whole.mix
    with pytest.raises(BadRequest, match="not ended"):
        _ = stream.reply
    assert "".join(chunk.text for chunk in stream) == whole.text
    assert replace(stream.reply, ms={}) == replace(whole, ms={})


def test_a_stream_can_be_left_early_and_runs_inside_an_event_loop(lm):
    async def first() -> str:
        for chunk in lm.stream(SQL, "sql", sampling=replace(GREEDY, max_tokens=64)):
            return chunk.text
        return ""

    assert lm.ask(SQL, "sql", sampling=replace(GREEDY, max_tokens=64)).text.startswith(
        asyncio.run(first())
    )


def test_history_is_kept_across_mixes(faked):
    talk = Conversation(faked)
    list(talk.say("my card?"))
    talk.mix = "sql"
    list(talk.say("and now?"))
    assert [str(reply.mix) for _, reply in talk.turns] == ["banking:0.9", "sql"]
    roles = [message.role for message in talk.messages]
    assert roles == ["user", "assistant", "user", "assistant"]


def test_a_turn_that_fails_leaves_the_history_as_it_was(faked):
    talk = Conversation(faked)
    list(talk.say("my card?"))
    with pytest.raises(BadRequest):
        list(talk.say(" "))
    assert len(talk.turns) == 1


@pytest.mark.parametrize("text", ["", " \n\t", "bell \a", "nul \0", "half \ud800"])
def test_texts_nobody_can_answer_are_refused(faked, text):
    with pytest.raises(BadRequest):
        faked.ask(text)


def test_conversations_end_with_the_user(faked):
    for messages in ((), (Message("user", "hi"), Message("assistant", "ho"))):
        with pytest.raises(BadRequest, match="user"):
            faked.ask(messages)


def test_what_cannot_be_mixed_or_routed_is_refused(faked, lm, shop):
    with pytest.raises(UnknownAdapter, match="Did you mean 'banking'"):
        lm.ask("hi", mix="bankin", sampling=GREEDY)
    with pytest.raises(MixSyntaxError):
        faked.ask("hi", mix="sql:much")
    with pytest.raises(RouteError, match="route fit"):
        LM(FakeEngine(), Library(Path(shop.library))).ask("hi")


def test_pocket_has_its_own_library_and_other_bases_have_yours(monkeypatch, tmp_path):
    monkeypatch.setenv("LORAMIX_LIBRARY", str(tmp_path))
    assert default_library("gpt2") == own_library() == tmp_path
    assert default_library("pocket").parts[-2:] == ("pocket", "library")
    monkeypatch.delenv("LORAMIX_LIBRARY")
    assert own_library().parts[-2:] == ("loramix", "library")
