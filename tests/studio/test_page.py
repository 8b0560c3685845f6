"""What the page does, without a browser: through NiceGUI's simulated user."""

from __future__ import annotations

import asyncio
import time

import pytest
from nicegui import ui
from nicegui.testing.user import User
from nicegui.testing.user_interaction import UserInteraction

from loramix.studio import answers, history, page
from loramix.studio.fader import Fader
from tests.shop import BANKING, SQL
from tests.studio.conftest import Site


def test_a_question_is_answered_kept_and_told_why(site: Site):
    async def story():
        user = await opened(site)
        await ask(user, BANKING)
        return labels(user, "mix"), labels(user, "facts"), labels(user, "percent")

    mix, facts, percent = site.act(story())
    (head,) = conversations(site)
    question, answer = turns(site, head["id"])
    assert head["title"] == question["content"] == BANKING
    assert mix == [answer["mix"]] == ["banking"]
    assert facts[0].startswith(f"routed · {answer['completion_tokens']} tokens · ")
    assert len(percent) == 3


def test_a_reload_shows_what_was_said_and_goes_on(site: Site):
    async def story():
        user = await opened(site)
        await ask(user, BANKING)
        (head,) = await asyncio.to_thread(conversations, site)
        again = await opened(site, f"/?chat={head['id']}")
        shown = [html.content for html in found(again, ui.html, "text")]
        await ask(again, SQL)
        return head["id"], shown

    id, shown = site.act(story())
    kept = turns(site, id)
    assert shown == [kept[1]["content"]]
    assert [turn["mix"] for turn in kept if turn["role"] == "assistant"] == ["banking", "sql"]


def test_another_mix_answers_beside_the_first(site: Site):
    async def story():
        user = await opened(site)
        await ask(user, BANKING)
        fader(user, "sql").value = 0.5
        assert [button.text for button in found(user, ui.button, "again")] == [
            "Again with banking+sql:0.5"
        ]
        num_before = len(labels(user, "facts"))
        user.find("Again with banking+sql:0.5").click()
        await until(lambda: len(labels(user, "facts")) > num_before)
        return labels(user, "mix")

    assert site.act(story()) == ["banking", "banking+sql:0.5"]
    (head,) = conversations(site)
    kept = turns(site, head["id"])
    assert [(turn["number"], turn["version"]) for turn in kept] == [(0, 0), (1, 0), (1, 1)]


def test_stop_keeps_what_there_is(site: Site, slow: None):
    async def story():
        user = await opened(site)
        await type_in(user, "list the names")
        user.find("arrow_upward").click()
        await until(lambda: any(html.content for html in found(user, ui.html, "text")))
        user.find("stop").click()
        await until(lambda: labels(user, "facts"))
        return found(user, ui.html, "text")[0].content, labels(user, "facts")[0]

    text, facts = site.act(story())
    assert facts.endswith("stopped")
    (head,) = conversations(site)
    wait_for(lambda: turns(site, head["id"]))
    answer = turns(site, head["id"])[1]
    assert answer["finish"] == "cancelled"
    assert answer["content"].startswith(text)
    assert answer["completion_tokens"] < site.front.service.limits.answer_tokens


def test_a_reload_finds_its_answer_under_way(site: Site, slow: None):
    async def story():
        user = await opened(site)
        await type_in(user, "list the names")
        user.find("arrow_upward").click()
        await until(lambda: found(user, ui.html, "text"))
        (head,) = await asyncio.to_thread(conversations, site)
        user._client.delete()
        again = await opened(site, f"/?chat={head['id']}")
        assert [e.text for e in again._client.elements.values() if isinstance(e, ui.label)].count(
            "list the names"
        )
        await until(lambda: labels(again, "facts"))
        return head["id"], found(again, ui.html, "text")[0].content

    id, shown = site.act(story())
    answer = turns(site, id)[1]
    assert (answer["content"], answer["finish"]) == (shown, "length")


def test_an_answer_nobody_looks_at_is_stopped(
    site: Site, slow: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(answers, "LINGER_S", 0.01)

    async def story():
        user = await opened(site)
        await type_in(user, "list the names")
        user.find("arrow_upward").click()
        await until(lambda: any(html.content for html in found(user, ui.html, "text")))
        user._client.delete()

    site.act(story())
    (head,) = conversations(site)
    wait_for(lambda: turns(site, head["id"]))
    assert turns(site, head["id"])[1]["finish"] == "cancelled"


def test_a_refusal_is_told_in_words_and_the_question_is_not_lost(site: Site):
    long = "count the names of all singers " * 3000

    async def story():
        user = await opened(site)
        await type_in(user, long)
        user.find("arrow_upward").click()
        await until(lambda: any(labels(user, "notice")))
        composer = found(user, ui.textarea, "")[0]
        return [text for text in labels(user, "notice") if text], composer.value

    (notice,), question = site.act(story())
    assert "token" in notice
    assert question == long.strip()


def test_a_conversation_that_is_not_there_is_said(site: Site):
    async def story():
        user = await opened(site, "/?chat=lost")
        return [text for text in labels(user, "notice") if text]

    assert site.act(story()) == ["There is no conversation 'lost' of this key."]


def test_older_conversations_are_listed_once(site: Site, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(page, "LIST", "/v1/conversations?limit=2")
    monkeypatch.setattr(history, "LIST", "/v1/conversations?limit=2")
    for number in range(5):
        site.front.post("/v1/conversations", title=f"chat {number}")

    async def story():
        user = await opened(site)

        def listed() -> list[str]:
            return [each.text for each in found(user, ui.button, "entry-title")]

        first = listed()
        for size in (4, 5):
            press(user, one(found(user, ui.button, ""), "Older"))
            await until(lambda size=size: len(listed()) == size)
        return first, listed(), [each.text for each in found(user, ui.button, "")]

    newest = [f"chat {number}" for number in (4, 3, 2, 1, 0)]
    first, all_, buttons = site.act(story())
    assert (first, all_) == (newest[:2], newest)
    assert "Older" not in buttons


def test_conversations_are_renamed_and_deleted(site: Site):
    made = site.front.post("/v1/conversations", title="old").json()

    async def rename():
        user = await opened(site, f"/?chat={made['id']}")
        press(user, found(user, ui.menu_item, "")[0])
        await asyncio.sleep(0.05)
        title = next(e for e in found(user, ui.input, "") if e.props.get("label") == "Title")
        assert title.value == "old"
        title.value = "new"
        press(user, one(found(user, ui.button, ""), "Rename"))
        await until(lambda: any(e.text == "new" for e in found(user, ui.button, "entry-title")))

    async def delete():
        user = await opened(site)
        press(user, found(user, ui.menu_item, "")[1])
        await asyncio.sleep(0.05)
        press(user, one(found(user, ui.button, ""), "Delete"))
        await until(lambda: not found(user, ui.button, "entry-title"))

    site.act(rename())
    assert [head["title"] for head in conversations(site)] == ["new"]
    site.act(delete())
    assert conversations(site) == []


async def opened(site: Site, path: str = "/", **headers: str) -> User:
    user = site.user(**headers)
    await user.open(path)
    return user


async def type_in(user: User, text: str) -> None:
    found(user, ui.textarea, "")[0].value = text


async def ask(user: User, text: str) -> None:
    """Ask, and wait for the end of the answer."""
    num_before = len(labels(user, "facts"))
    await type_in(user, text)
    user.find("arrow_upward").click()
    await until(lambda: len(labels(user, "facts")) > num_before)


def found(user: User, kind, css: str):
    elements = user._client.elements.values()
    return [e for e in elements if isinstance(e, kind) and (not css or css in e.classes)]


def one(elements, text: str):
    (it,) = [element for element in elements if element.text == text]
    return it


def press(user: User, element) -> None:
    UserInteraction(user, {element}, None).click()


def labels(user: User, css: str) -> list[str]:
    return [element.text for element in found(user, ui.label, css)]


def fader(user: User, name: str) -> Fader:
    (it,) = [e for e in found(user, Fader, "") if e.props["aria-label"] == f"Weight of {name}"]
    return it


async def until(true, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come true in time"
        await asyncio.sleep(0.02)


def wait_for(true, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.02)


def conversations(site: Site):
    return site.front.http.get("/v1/conversations").json()["data"]


def turns(site: Site, id: str):
    return site.front.http.get(f"/v1/conversations/{id}").json()["turns"]
