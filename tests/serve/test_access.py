"""Two keys with two sets of adapters, roles, limits, and what happens without any key."""

import httpx
import pytest

import loramix
from loramix.errors import TooMany
from loramix.serve.access import Rates
from loramix.serve.app import create_app
from loramix.serve.service import Service
from loramix.store import Store
from loramix.store.records import Key
from tests.serve.front import running
from tests.serve.keyed import client
from tests.shop import BANKING, SQL


@pytest.fixture(scope="module")
def lm(shop):
    with loramix.open(shop.base, shop.library) as lm:
        yield lm


@pytest.fixture
def store(tmp_path):
    with Store.open(f"sqlite:///{tmp_path}/loramix.db") as store:
        yield store


@pytest.fixture
def front(lm, store):
    with running(Service(lm, store)) as front:
        yield front


def chat(text, model="", **more):
    asked = {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 6}
    return asked | {"model": model} | more


def say(http, text, model="", **more):
    return http.post("/v1/chat/completions", json=chat(text, model, **more))


def test_without_keys_whoever_is_here_is_admin(front):
    for secret in ("", "anything"):
        with client(front, secret) as http:
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


def test_with_keys_every_request_needs_one(front, store):
    _, secret = store.keys.add("ada", role="admin")
    other = secret.replace(secret[-4:], "AAAA")
    for wrong in ("", "none", other, secret[:-1]):
        with client(front, wrong) as http:
            for path in ("/v1/models", "/metrics", "/lora-adapters", "/nowhere", "/v1/adapters"):
                got = http.get(path)
                assert (got.status_code, got.json()["error"]["type"]) == (
                    401,
                    "authentication_error",
                )
                assert got.headers["www-authenticate"] == "Bearer"
            assert say(http, BANKING).status_code == 401
            assert http.get("/health").status_code == http.get("/openapi.json").status_code == 200
    with client(front, secret) as http:
        assert http.get("/v1/models").status_code == 200
        assert http.get("/metrics").status_code == 200
        store.keys.remove("ada")
        store.keys.add("bob")
        assert http.get("/v1/models").status_code == 401


def test_a_users_key_changes_nothing(front, store):
    _, secret = store.keys.add("ada")
    with client(front, secret) as http:
        for method, path, body in [
            ("GET", "/v1/adapters", None), ("DELETE", "/v1/adapters/sql", None),
            ("PATCH", "/v1/adapters/sql", {"weight": 2}), ("GET", "/metrics", None),
            ("GET", "/lora-adapters", None), ("POST", "/lora-adapters", []),
            ("POST", "/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "x"}),
            ("POST", "/v1/unload_lora_adapter", {"lora_name": "sql"}),
        ]:  # fmt: skip
            got = http.request(method, path, json=body)
            assert (got.status_code, got.json()["error"]["type"]) == (403, "permission_error"), path
    assert "sql" in front.service.names()


WAYS = [
    {"model": "sql"}, {"model": "pocket:sql"}, {"model": "base:sql"}, {"model": "sql:0.001"},
    {"model": "banking:0.5+sql:0.5"}, {"mix": {"sql": 1}}, {"mix": {"banking": 1, "sql": -1}},
    {"mix": "sql"}, {"lora": [{"name": "sql", "scale": 1}]}, {"lora": [{"id": 1, "scale": 1}]},
    {"adapter_id": "sql"}, {"merged_adapters": {"ids": ["sql"], "weights": [1.0]}},
]  # fmt: skip


def test_no_key_reaches_the_others_adapters(front, store):
    secrets = {name: store.keys.add(name, adapters=[name])[1] for name in ("banking", "sql")}
    with client(front, secrets["banking"]) as mine, client(front, secrets["sql"]) as other:
        wanted = say(other, SQL, "sql").json()["choices"]  # now it lies in the prefix cache
        for way in WAYS:
            for stream in (False, True):
                got = say(mine, SQL, **({"model": ""} | way), stream=stream)
                assert got.status_code in (400, 404), way
                assert wanted[0]["message"]["content"] not in got.text
            body = {"prompt": "the cat", "max_tokens": 2} | way
            assert mine.post("/v1/completions", json=body).status_code in (400, 404), way
        assert mine.get("/v1/models/sql").status_code == 404
        assert mine.get("/v1/models/banking:0.5+sql:0.5").status_code == 404
        listed = [model["id"] for model in mine.get("/v1/models").json()["data"]]
        assert "banking" in listed
        assert "sql" not in listed
        routed = mine.post("/v1/route", json={"text": SQL}).json()
        assert "sql" not in str(routed)
        answer = say(mine, SQL, "auto")
        assert answer.status_code == 200
        assert "sql" not in answer.json()["model"] + str(answer.json()["loramix"])


def test_the_same_prompt_never_comes_from_the_others_cache(shop, store):
    with loramix.open(shop.base, shop.library) as lm, running(Service(lm, store)) as front:
        _ask_by_turns(front, store, lm)


def _ask_by_turns(front, store, lm):
    text = "the names of all singers and the ages of all pupils"
    secrets = {name: store.keys.add(name, adapters=[name])[1] for name in ("banking", "sql")}
    with client(front, secrets["sql"]) as other:
        assert say(other, text, "sql").is_success
    assert lm.engine.statistics().num_cached_tokens == 0
    with client(front, secrets["banking"]) as mine:
        assert say(mine, text, "banking").is_success
    assert lm.engine.statistics().num_cached_tokens == 0
    with client(front, secrets["sql"]) as other:
        assert say(other, text, "sql").is_success
    assert lm.engine.statistics().num_cached_tokens > 10  # it was there


def test_limits_answer_429_and_say_when_to_come_back(front, store):
    _, few = store.keys.add("few", requests_per_minute=2)
    _, short = store.keys.add("short", tokens_per_minute=5)
    with client(front, few) as http:
        assert [http.get("/v1/models").status_code for _ in range(3)] == [200, 200, 429]
        got = http.get("/v1/models")
        assert 25 <= int(got.headers["retry-after"]) <= 30
        assert got.json()["error"]["type"] == "rate_limit_error"
    with client(front, short) as http:
        assert say(http, BANKING, "base").status_code == 200
        got = say(http, BANKING, "base")
        assert got.status_code == 429
        assert int(got.headers["retry-after"]) > 12


def test_a_database_that_is_gone_is_a_503(front, store, monkeypatch):
    from loramix.errors import StoreError

    def gone():
        raise StoreError("The database cannot be used.")

    monkeypatch.setattr(store.keys, "is_empty", gone)
    with client(front) as http:
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
