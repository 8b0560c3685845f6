"""Two keys with two sets of adapters, roles, limits, and what happens without any key."""

import httpx
import pytest

import loramix
from loramix.errors import TooMany
from loramix.mix import Mix
from loramix.route import Decision
from loramix.serve.access import Rates
from loramix.serve.app import create_app
from loramix.serve.service import Service
from loramix.store.records import Key
from tests.serve.front import running
from tests.serve.keyed import client
from tests.shop import BANKING, SQL

GREEDY = {"temperature": 0, "max_tokens": 6}


def chat(text, model="", **more):
    return {"messages": [{"role": "user", "content": text}], "model": model} | GREEDY | more


def say(http, text, model="", **more):
    return http.post("/v1/chat/completions", json=chat(text, model, **more))


def test_without_keys_whoever_is_here_is_admin(keeping):
    for secret in ("", "anything"):
        with client(keeping, secret) as http:
            assert say(http, BANKING, "banking").status_code == 200
            assert http.get("/v1/adapters").status_code == 200


@pytest.mark.parametrize(("insecure", "status"), [(False, 401), (True, 200)])
def test_without_keys_other_machines_stay_out(lm, store, insecure, status):
    import asyncio

    async def ask():
        app = create_app(Service(lm, store, insecure=insecure))
        transport = httpx.ASGITransport(app, client=("192.0.2.7", 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as http:
            return await http.get("/v1/models"), await http.get("/health")

    models, health = asyncio.run(ask())
    assert (models.status_code, health.status_code) == (status, 200)


def test_with_keys_every_request_needs_one(keeping, store):
    _, secret = store.keys.add("ada", role="admin")
    other = secret.replace(secret[-4:], "AAAA")
    for wrong in ("", "none", other, secret[:-1]):
        with client(keeping, wrong) as http:
            for path in ("/v1/models", "/metrics", "/lora-adapters", "/nowhere", "/v1/adapters"):
                got = http.get(path)
                assert (got.status_code, got.json()["error"]["type"]) == (
                    401,
                    "authentication_error",
                )
                assert got.headers["www-authenticate"] == "Bearer"
            assert say(http, BANKING).status_code == 401
            assert http.get("/health").status_code == http.get("/openapi.json").status_code == 200
    with client(keeping, secret) as http:
        assert http.get("/v1/models").status_code == 200
        assert http.get("/metrics").status_code == 200
        store.keys.remove("ada")
        store.keys.add("bob")
        assert http.get("/v1/models").status_code == 401


FOR_USERS = (
    "/v1/chat/",
    "/v1/completions",
    "/v1/models",
    "/v1/route",
    "/v1/conversations",
    "/api/",
    "/health",
    "/ready",
)
BODIES = {
    "/lora-adapters": [],
    "/v1/load_lora_adapter": {"lora_name": "x", "lora_path": "x"},
    "/v1/unload_lora_adapter": {"lora_name": "sql"},
    "/v1/adapters/{name}": {"weight": 2},
    "/v1/feedback": {"text": "x", "right": None},
    "/v1/jobs": {"config": {}},
}


def test_a_users_key_changes_nothing(keeping, store):
    _, secret = store.keys.add("ada")
    paths = keeping.http.get("/openapi.json").json()["paths"]
    routes = [(path, method) for path in paths for method in paths[path]]
    guarded = [route for route in routes if not route[0].startswith(FOR_USERS)]
    assert len(guarded) > 20
    with client(keeping, secret) as http:
        for path, method in guarded:
            place = path.replace("{name}", "sql").replace("{id}", "x")
            got = http.request(method.upper(), place, json=BODIES.get(path))
            assert (got.status_code, got.json()["error"]["type"]) == (403, "permission_error"), path
    assert "sql" in keeping.service.names()


WAYS = [
    {"model": "sql"}, {"model": "pocket:sql"}, {"model": "base:sql"}, {"model": "sql:0.001"},
    {"model": "banking:0.5+sql:0.5"}, {"mix": {"sql": 1}}, {"mix": {"banking": 1, "sql": -1}},
    {"mix": "sql"}, {"lora": [{"name": "sql", "scale": 1}]}, {"lora": [{"id": 1, "scale": 1}]},
    {"adapter_id": "sql"}, {"merged_adapters": {"ids": ["sql"], "weights": [1.0]}},
]  # fmt: skip


@pytest.fixture
def pair(keeping, store):
    """Two users' clients; banking is the adapter of one, sql that of the other."""
    secrets = {name: store.keys.add(name, adapters=[name])[1] for name in ("banking", "sql")}
    with client(keeping, secrets["banking"]) as mine, client(keeping, secrets["sql"]) as other:
        yield mine, other


def asked_under(way, **more):
    return ({"model": ""} if "model" not in way else {}) | way | more


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_no_key_runs_the_others_adapters(pair, way):
    mine, other = pair
    wanted = say(other, SQL, "sql").json()["choices"]  # now it lies in the prefix cache
    id = mine.post("/v1/conversations", json={}).json()["id"]
    own = GREEDY | {"content": SQL, "mix": "banking"}
    assert mine.post(f"/v1/conversations/{id}/turns", json=own).is_success
    turn = GREEDY | way
    for stream in (False, True):
        for path, body in [
            ("/v1/chat/completions", chat(SQL, **asked_under(way, stream=stream))),
            ("/v1/completions", asked_under(way, prompt=SQL, stream=stream)),
            (f"/v1/conversations/{id}/turns", {"content": SQL, "stream": stream} | turn),
            (f"/v1/conversations/{id}/regenerate", {"stream": stream} | turn),
        ]:
            got = mine.post(path, json=body)
            assert got.status_code in (400, 404), (path, got.text)
            assert wanted[0]["message"]["content"] not in got.text
    assert len(mine.get(f"/v1/conversations/{id}").json()["turns"]) == 2


@pytest.mark.parametrize("id", ["sql", "base:sql", "sql:0.5", "banking:0.5+sql:0.5"])
def test_no_key_runs_the_others_workflows_or_finds_their_models(pair, id):
    mine, _ = pair
    asked = {"workflow_id": id, "input": {"prompt": SQL}}
    for more in ({}, {"stream": True}, {"wait_for_completion": False}):
        assert mine.post("/api/workflows/runs", json=asked | more).status_code == 404
    assert mine.get(f"/api/workflows/{id}/schema").status_code == 404
    assert mine.get(f"/v1/models/{id}").status_code == 404


def test_no_key_lists_the_others_adapters(pair):
    mine, other = pair
    for path in ("/v1/models", "/api/workflows"):
        assert "banking" in mine.get(path).text
        assert "sql" not in mine.get(path).text
    for path in ("/metrics", "/lora-adapters", "/v1/adapters", "/v1/adapters/banking"):
        assert mine.get(path).status_code == 403
    refused = say(mine, SQL, "sqll").json()["error"]["message"]
    assert "sql" not in refused.replace("sqll", "")  # no hint either
    for own, known in ((mine, "banking"), (other, "sql")):
        assert known in say(own, SQL, "nobody").json()["error"]["message"]


@pytest.mark.parametrize("text", [SQL, f"{BANKING}. {SQL}"])
def test_no_key_is_routed_to_the_others_adapters(pair, text):
    mine, _ = pair
    routed = mine.post("/v1/route", json={"text": text}).json()
    assert "sql" not in str(routed)
    assert sum(routed["scores"].values()) + routed["none"] == pytest.approx(1)
    for answer in (
        say(mine, text, "auto").json(),
        say(mine, text).json(),  # auto, too
        mine.post("/api/workflows/runs", json={"input": {"prompt": text}}).json()["output"],
    ):
        assert "sql" not in str(answer["loramix"]).replace(text, "")
        assert answer["loramix"]["mix"] == routed["mix"]


def test_a_task_and_a_conversation_are_their_makers(pair):
    mine, other = pair
    asked = {"workflow_id": "sql", "input": {"prompt": SQL}}
    task = other.post("/api/workflows/runs", json=asked).json()["task_id"]
    talk = other.post("/v1/conversations", json={}).json()["id"]
    assert mine.get(f"/api/tasks/{task}").status_code == 404
    assert mine.post(f"/api/tasks/{task}/cancel").status_code == 404
    own = {"workflow_id": "banking", "input": {"prompt": SQL}, "session_id": talk}
    assert mine.post("/api/workflows/runs", json=own).status_code == 404


def a_decision(mix, scores, none=0.0):
    reasons = ("near 0.9 sql: list", "near 0.8 banking: card", "words for sql: names")
    return Decision(Mix.parse(mix), scores, none, reasons, 1.0)


@pytest.mark.parametrize(
    ("mix", "scores", "left", "says"),
    [
        ("banking", {"banking": 0.7, "sql": 0.2}, "banking", "banking: what fits of"),
        ("banking:0.45+sql:0.55", {"banking": 0.4, "sql": 0.5}, "banking", "banking: what"),
        ("banking:0.6+sql:0.9", {"banking": 1.0, "sql": 1.0}, "banking:0.6", "banking:0.6"),
        ("banking:-0.5+sql:1.5", {"banking": 1.0, "sql": 1.0}, "banking:-0.5", "banking:-0.5"),
        ("sql", {"banking": 0.1, "sql": 0.8}, "base", "base: nothing fits of the adapters on"),
        ("base", {"banking": 0.1, "sql": 0.1}, "base", "base: nothing fits"),
    ],
)
def test_auto_is_decided_as_if_there_were_only_ones_own(
    pair, lm, monkeypatch, mix, scores, left, says
):
    made = a_decision(mix, scores, 1 - sum(scores.values()))
    monkeypatch.setattr(lm, "route", lambda messages: made)
    routed = pair[0].post("/v1/route", json={"text": SQL}).json()
    assert (routed["mix"], routed["scores"]) == (left, {"banking": scores["banking"]})
    assert routed["none"] == pytest.approx(1 - scores["banking"])
    first, *more = routed["reasons"]
    assert first.startswith(says)
    assert more == ["near 0.8 banking: card"]
    assert "sql" not in str(routed)


@pytest.mark.parametrize(("score", "none"), [(float("nan"), 0.1), (0.5, float("nan"))])
def test_a_router_that_gives_no_numbers_has_failed(keeping, lm, monkeypatch, score, none):
    made = a_decision("sql", {"sql": score}, none)
    monkeypatch.setattr(lm, "route", lambda messages: made)
    got = keeping.chat(model="auto")
    assert (got.status_code, "no number" in got.text) == (503, True)


def test_the_same_prompt_never_comes_from_the_others_cache(shop, store):
    with loramix.open(shop.base, shop.library) as lm, running(Service(lm, store)) as keeping:
        _ask_by_turns(keeping, store, lm)


def _ask_by_turns(keeping, store, lm):
    text = "the names of all singers and the ages of all pupils"
    secrets = {name: store.keys.add(name, adapters=[name])[1] for name in ("banking", "sql")}
    with client(keeping, secrets["sql"]) as other:
        assert say(other, text, "sql").is_success
    assert lm.engine.statistics().num_cached_tokens == 0
    with client(keeping, secrets["banking"]) as mine:
        assert say(mine, text, "banking").is_success
    assert lm.engine.statistics().num_cached_tokens == 0
    with client(keeping, secrets["sql"]) as other:
        assert say(other, text, "sql").is_success
    assert lm.engine.statistics().num_cached_tokens > 10  # it was there


def test_limits_answer_429_and_say_when_to_come_back(keeping, store):
    _, few = store.keys.add("few", requests_per_minute=2)
    _, short = store.keys.add("short", tokens_per_minute=5)
    with client(keeping, few) as http:
        assert [http.get("/v1/models").status_code for _ in range(3)] == [200, 200, 429]
        got = http.get("/v1/models")
        assert 25 <= int(got.headers["retry-after"]) <= 30
        assert got.json()["error"]["type"] == "rate_limit_error"
    with client(keeping, short) as http:
        assert say(http, BANKING, "base").status_code == 200
        got = say(http, BANKING, "base")
        assert got.status_code == 429
        assert int(got.headers["retry-after"]) > 12


def test_a_database_that_is_gone_is_a_503(keeping, store, monkeypatch):
    from loramix.errors import StoreError

    def gone():
        raise StoreError("The database cannot be used.")

    monkeypatch.setattr(store.keys, "is_empty", gone)
    with client(keeping) as http:
        assert http.get("/v1/models").status_code == 503
        monkeypatch.undo()
        assert http.get("/v1/models").status_code == 200


def a_key(**limits):
    return Key("id", "ada", "user", None, **({"requests_per_minute": None,
               "tokens_per_minute": None} | limits), created=0)  # fmt: skip


def test_buckets_fill_up_within_a_minute():
    now = [0.0]
    rates = Rates(lambda: now[0])
    key = a_key(requests_per_minute=3)
    for _ in range(3):
        rates.enter(key)
    with pytest.raises(TooMany, match="3 requests in a minute"):
        rates.enter(key)
    now[0] = 19.9
    with pytest.raises(TooMany) as error:
        rates.enter(key)
    assert error.value.headers == {"retry-after": "1"}
    now[0] = 20.1
    rates.enter(key)
    now[0] = 1000
    for _ in range(3):  # never more than a minute's worth
        rates.enter(key)
    with pytest.raises(TooMany):
        rates.enter(key)


def test_an_answer_that_overdraws_is_paid_back():
    now = [0.0]
    rates = Rates(lambda: now[0])
    key = a_key(tokens_per_minute=60)
    rates.enter(key)
    rates.spend(key, 100)
    with pytest.raises(TooMany) as error:
        rates.enter(key)
    assert error.value.headers == {"retry-after": "41"}
    now[0] = 41
    rates.enter(key)
