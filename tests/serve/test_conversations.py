"""Conversations over HTTP: what is kept, whose it is, and that it goes on."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from loramix.chat import Message
from loramix.engine import Request, Sampling
from loramix.mix import Mix
from loramix.serve.service import Service
from loramix.store import Store
from tests.serve.front import running, wait_for
from tests.serve.keyed import client
from tests.shop import BANKING, SQL

GREEDY = {"temperature": 0, "max_tokens": 6}


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path}/loramix.db"


@pytest.fixture
def front(lm, url):
    with Store.open(url) as store, running(Service(lm, store)) as front:
        yield front


def made(http, **body):
    got = http.post("/v1/conversations", json=body)
    assert got.status_code == 201, got.text
    return f"/v1/conversations/{got.json()['id']}"


def say(http, place, text, **more):
    return http.post(f"{place}/turns", json={"content": text} | GREEDY | more)


def offline(lm, mix, *messages):
    sampling = Sampling(temperature=0, max_tokens=6)
    turns = tuple(Message(role, text) for role, text in messages)
    return lm.engine.generate([Request(turns, Mix.parse(mix), sampling)])[0].text


def test_a_turn_records_what_made_it_and_the_next_one_sees_it(front, lm):
    place = made(front.http, title="cards", system="Be brief.")
    got = say(front.http, place, BANKING, mix="auto")
    question, answer = got.json()["turns"]
    assert (question["role"], question["content"]) == ("user", BANKING)
    told = [("system", "Be brief."), ("user", BANKING)]
    assert answer["content"] == offline(lm, "banking", *told)
    assert answer["mix"] == got.headers["x-loramix-mix"] == "banking"
    assert answer["scores"]["banking"] > 0.5
    assert answer["reasons"]
    assert answer["prompt_tokens"] > answer["completion_tokens"] > 0
    assert answer["ms"] > 0
    assert answer["trace"] == got.headers["x-request-id"] == question["trace"]
    told += [("assistant", answer["content"]), ("user", SQL)]
    later = say(front.http, place, SQL, mix={"sql": 0.5}).json()["turns"][1]
    assert (later["mix"], later["number"]) == ("sql:0.5", 3)
    assert later["content"] == offline(lm, "sql:0.5", *told)
    found = front.http.get(place).json()
    assert found["title"] == "cards"
    assert found["turns"][:2] == [question, answer]
    assert found["turns"][3] == later


def test_a_stream_ends_with_what_was_kept(front):
    place = made(front.http)
    whole = say(front.http, made(front.http), BANKING, model="banking").json()["turns"][1]
    got = say(front.http, place, BANKING, model="banking", stream=True)
    events = [line.removeprefix("data: ") for line in got.text.splitlines() if line]
    assert events[-1] == "[DONE]"
    *chunks, kept = map(json.loads, events[:-1])
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert kept["object"] == "conversation.turns"
    assert text == whole["content"] == kept["turns"][1]["content"]
    assert front.http.get(place).json()["turns"] == kept["turns"]


def test_an_answer_is_given_again_under_another_mix(front, lm):
    place = made(front.http)
    first = say(front.http, place, BANKING, mix="banking").json()["turns"][1]
    got = front.http.post(f"{place}/regenerate", json={"mix": "sql"} | GREEDY)
    [second] = got.json()["turns"]
    assert (first["version"], second["version"], second["number"]) == (0, 1, 1)
    assert second["content"] == offline(lm, "sql", ("user", BANKING))
    assert front.http.get(place).json()["turns"][1:] == [first, second]
    say(front.http, place, "more", mix="base")
    later = front.http.get(place).json()["turns"][-1]["content"]
    told = [("user", BANKING), ("assistant", second["content"]), ("user", "more")]
    assert later == offline(lm, "base", *told)


def test_its_own_system_prompt_counts_before_its_adapters(lm, url):
    service = Service(lm, Store.open(url), system_prompts={"sql": "Be brief."})
    with service.store, running(service) as front:
        place = made(front.http)
        for patch, said in (({}, "Be brief."), ({"system": "Be kind."}, "Be kind."),
                            ({"system": ""}, "Be brief.")):  # fmt: skip
            if patch:
                assert front.http.patch(place, json=patch).is_success
                got = front.http.post(f"{place}/regenerate", json={"mix": "sql"} | GREEDY)
            else:
                got = say(front.http, place, "hi", mix="sql")
            answer = got.json()["turns"][-1]["content"]
            assert answer == offline(lm, "sql", ("system", said), ("user", "hi"))
        other = front.http.post(f"{place}/regenerate", json={"mix": "banking"} | GREEDY).json()
        assert other["turns"][-1]["content"] == offline(lm, "banking", ("user", "hi"))


def test_a_chat_goes_on_after_a_restart(lm, url):
    with Store.open(url) as store, running(Service(lm, store)) as front:
        place = made(front.http)
        say(front.http, place, BANKING, mix="base")
        before = front.http.get(place).json()
    with Store.open(url) as store, running(Service(lm, store)) as front:
        assert front.http.get(place).json() == before
        assert say(front.http, place, SQL, mix="base").json()["turns"][1]["number"] == 3


def test_a_stream_that_is_left_keeps_what_there_is(front, lm, monkeypatch):
    forward = lm.engine._core.forward

    def slow(batch):
        time.sleep(0.05)
        return forward(batch)

    monkeypatch.setattr(lm.engine._core, "forward", slow)
    place = made(front.http)
    body = {"content": BANKING, "mix": "base", "stream": True, "max_tokens": 60, "temperature": 0}
    with front.http.stream("POST", f"{place}/turns", json=body) as got:
        next(got.iter_lines())
    wait_for(lambda: front.http.get(place).json()["turns"])
    question, answer = front.http.get(place).json()["turns"]
    assert question["content"] == BANKING
    assert answer["finish"] == "cancelled"
    assert 0 < answer["completion_tokens"] < 60
    wait_for(lambda: not lm.engine.statistics().running)


def test_of_two_answers_at_once_one_is_told(front):
    place = made(front.http)
    with ThreadPoolExecutor(2) as threads, client(front) as a, client(front) as b:
        asking = [threads.submit(say, http, place, "hi", mix="base") for http in (a, b)]
        statuses = sorted(each.result().status_code for each in asking)
    turns = front.http.get(place).json()["turns"]
    assert statuses in ([200, 409], [200, 200])
    assert len(turns) == 2 * statuses.count(200)


def test_rename_delete_list_export(front):
    first, second = made(front.http, title="one"), made(front.http, title="two")
    assert front.http.patch(first, json={"title": "new"}).json()["title"] == "new"
    listed = front.http.get("/v1/conversations").json()["data"]
    assert [each["title"] for each in listed] == ["new", "two"]
    part = front.http.get("/v1/conversations?limit=1").json()
    rest = front.http.get("/v1/conversations", params={"after": part["next"]}).json()
    assert [part["data"], rest["data"], rest["next"]] == [listed[:1], listed[1:], None]
    exported = front.http.get(f"{first}/export")
    assert exported.json() == front.http.get(first).json()
    assert exported.headers["content-disposition"].startswith("attachment")
    assert front.http.delete(second).status_code == 200
    for asked in (front.http.get(second), front.http.delete(second), say(front.http, second, "x")):
        assert asked.status_code == 404


def test_conversations_belong_to_the_key_that_made_them(front):
    keys = front.service.store.keys
    early = made(front.http, title="before there were keys")
    secrets = {name: keys.add(name)[1] for name in ("ada", "bob")}
    admin = keys.add("root", role="admin")[1]
    with (
        client(front, secrets["ada"]) as ada,
        client(front, secrets["bob"]) as bob,
        client(front, admin) as root,
    ):
        place = made(ada, title="mine")
        for other in (bob, root):
            got = [
                other.get(place), other.delete(place), other.get(f"{place}/export"),
                other.patch(place, json={"title": "x"}), say(other, place, "hi"),
                other.post(f"{place}/regenerate", json=GREEDY),
            ]  # fmt: skip
            assert {each.status_code for each in got} == {404}
        assert bob.get("/v1/conversations").json()["data"] == []
        assert [c["title"] for c in ada.get("/v1/conversations").json()["data"]] == ["mine"]
        assert root.get(early).status_code == 200
        assert ada.get(early).status_code == 404


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("", {"title": "x" * 201}), ("", {"title": "a\nb"}), ("", {"titel": "x"}),
        ("", {"system": "a\0b"}), ("", {"system": "\ud800"}), ("", {"title": "\ud800"}),
        ("/turns", {"content": "\ud800"}), ("/turns", {}), ("/turns", {"content": ""}),
        ("/turns", {"content": "a\0b"}), ("/turns", {"content": "hi", "n": 2}),
        ("/turns", {"content": "hi", "mix": "a++b"}), ("/turns", {"content": "hi", "top_p": 3}),
        ("/turns", {"content": "hi", "logprobs": True}), ("/regenerate", {}),
        ("/regenerate", {"content": "hi"}),
    ],
)  # fmt: skip
def test_what_cannot_be_is_a_400_and_keeps_nothing(front, path, body):
    place = made(front.http)
    raw = json.dumps(body)  # half a character too, escaped
    where = f"{place}{path}" if path else "/v1/conversations"
    got = front.http.post(where, content=raw, headers={"content-type": "application/json"})
    assert (got.status_code, bool(got.json()["error"]["message"])) == (400, True), got.text
    assert front.http.get(place).json()["turns"] == []
    assert front.http.patch(place, json={}).status_code == 400
    for bad in ("limit=0", "after=1", "after=x-y", f"after=1.5-{'g' * 32}"):
        assert front.http.get(f"/v1/conversations?{bad}").status_code == 400


def test_a_server_without_a_store_says_so(lm):
    with running(Service(lm)) as front:
        got = front.http.get("/v1/conversations")
        assert (got.status_code, "keeps nothing" in got.text) == (400, True)
