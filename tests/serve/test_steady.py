"""Overload, clients that leave, time that runs out, a router that breaks, the end of the server."""

import asyncio
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

import loramix
from loramix.engine.local import LocalEngine
from loramix.library import Library
from loramix.lm import LM, load_router
from loramix.serve.limits import Limits
from loramix.serve.service import Service
from tests.serve.front import running, wait_for
from tests.tiny import tiny_base


def slowed(engine, seconds):
    """An engine whose steps take this much longer."""
    forward = engine._core.forward

    def slow(batch):
        time.sleep(seconds)
        return forward(batch)

    engine._core.forward = slow
    return engine


@pytest.fixture
def make(shop):
    """A server whose engine takes its time."""
    lms = []

    def make(seconds=0.02, limits=Limits(), **options):
        base = tiny_base(seed=1)
        base.model.generation_config.eos_token_id = None  # answers are as long as is asked for
        library = Library(shop.library)
        engine = slowed(LocalEngine(base, library=library, **options), seconds)
        lms.append(LM(engine, library, load_router(library)))
        return running(Service(lms[-1], limits=limits))

    yield make
    for lm in lms:
        lm.close()


LONG = {"prompt": "the cat", "model": "sql", "max_tokens": 100, "temperature": 0}


def events(response):
    return [line.removeprefix("data: ") for line in response.iter_lines() if line]


def busy(front):
    return front.service.lm.engine.statistics().running


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot_within_a_step(make, stream):
    with make(seconds=0.05) as front:

        async def leave():
            async with httpx.AsyncClient(base_url=front.url) as client:
                body = LONG | {"stream": stream}
                asking = asyncio.create_task(client.post("/v1/completions", json=body))
                while not busy(front):
                    await asyncio.sleep(0.01)
                asking.cancel()

        asyncio.run(leave())
        left = time.monotonic()
        wait_for(lambda: not busy(front))
        assert time.monotonic() - left < 0.5  # 100 tokens would take 5 s


def test_a_full_queue_is_said_at_once(make):
    with make(max_batch=1, max_queue=1) as front, httpx.Client(base_url=front.url) as other:

        def ask():
            other.post("/v1/completions", json=LONG, timeout=30)

        def is_full():
            seen = front.service.lm.engine.statistics()
            return len(seen.running) == len(seen.waiting) == 1

        first, second = (threading.Thread(target=ask) for _ in range(2))
        first.start()
        wait_for(lambda: busy(front))
        second.start()
        wait_for(is_full)
        start = time.monotonic()
        got = front.complete()
        assert time.monotonic() - start < 1
        assert (got.status_code, got.json()["error"]["code"]) == (503, "server_busy")
        assert got.headers["retry-after"]
        first.join()
        second.join()
        assert front.complete().status_code == 200


def test_a_request_that_takes_too_long_ends(make):
    with make(limits=Limits(timeout_s=0.3)) as front:
        got = front.http.post("/v1/completions", json=LONG)
        assert (got.status_code, "took longer than 0.3 s" in got.text) == (504, True)
        with front.http.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as got:
            *_, error, done = events(got)
        assert "took longer" in json.loads(error)["error"]["message"]
        assert done == "[DONE]"
        wait_for(lambda: not busy(front))


def test_a_router_that_breaks_is_never_a_silent_base(make):
    with make(seconds=0) as front:

        def broken(messages):
            raise ZeroDivisionError

        front.service.lm.route = broken
        got = front.chat(model="auto")
        assert (got.status_code, "router failed" in got.json()["error"]["message"]) == (503, True)
        assert front.chat(model="sql").status_code == 200


def test_the_end_lets_short_answers_finish_and_tells_long_ones(make):
    with make(limits=Limits(shutdown_s=0.8)) as front:
        texts = {}

        def ask(name, **body):
            with httpx.Client(base_url=front.url, timeout=30) as client:
                body = LONG | {"stream": True} | body
                with client.stream("POST", "/v1/completions", json=body) as got:
                    texts[name] = events(got)

        threads = [
            threading.Thread(target=ask, args=("short",), kwargs={"max_tokens": 20}),
            threading.Thread(target=ask, args=("long",)),
        ]
        for thread in threads:
            thread.start()
        wait_for(lambda: len(busy(front)) == 2)
        front.server.should_exit = True
        wait_for(lambda: front.service.live.is_ending)
        for thread in threads:
            thread.join()
    assert json.loads(texts["short"][-2])["choices"][0]["finish_reason"] == "length"
    last = json.loads(texts["long"][-2])["error"]
    assert "shutting down" in last["message"]
    assert texts["long"][-1] == texts["short"][-1] == "[DONE]"


def test_adapters_that_are_slow_to_read_hold_up_nobody_else(make, monkeypatch):
    reading = threading.Event()
    load = Library.load

    def slow(library, name):
        reading.wait(10)
        return load(library, name)

    monkeypatch.setattr(Library, "load", slow)
    with make(seconds=0) as front, ThreadPoolExecutor(32) as clients:
        body = LONG | {"max_tokens": 2}
        asking = [
            clients.submit(httpx.post, f"{front.url}/v1/completions", json=body) for _ in range(32)
        ]
        wait_for(lambda: sum("serve" in thread.name for thread in threading.enumerate()) >= 32)
        start = time.monotonic()
        assert front.http.get("/v1/models").is_success
        assert front.post("/v1/route", text="the cat").is_success
        assert time.monotonic() - start < 1
        reading.set()
        assert all(each.result().is_success for each in asking)


def test_an_adapter_deleted_while_it_answers_goes_on_and_is_gone(make, shop, tmp_path):
    library = Library(tmp_path / "library")
    library.add(str(Library(shop.library).path("sql")), name="sql")
    base = tiny_base(seed=1)
    base.model.generation_config.eos_token_id = None
    with LM(slowed(LocalEngine(base, library=library), 0.01), library) as lm:
        wanted = lm.engine.generate([_question()])[0].text
        with running(Service(lm)) as front:
            got = {}
            thread = threading.Thread(
                target=lambda: got.update(front.http.post("/v1/completions", json=LONG).json())
            )
            thread.start()
            wait_for(lambda: busy(front))
            with httpx.Client(base_url=front.url) as other:
                assert other.delete("/v1/adapters/sql").status_code == 200
                assert other.post("/v1/completions", json=LONG).status_code == 404
                assert other.post("/v1/completions", json=LONG | {"model": "base"}).is_success
            thread.join()
    assert got["choices"][0]["text"] == wanted


def _question():
    from loramix.engine import Request, Sampling

    sampling = Sampling(temperature=0, max_tokens=100)
    return Request("the cat", loramix.Mix.parse("sql"), sampling)
