"""Health, metrics and the log: what those see who look after the server."""

import io
import json
import logging

import pytest
from prometheus_client.parser import text_string_to_metric_families

from loramix.engine.fake import FakeEngine
from loramix.library import Library
from loramix.lm import LM
from loramix.serve.logs import JsonLines
from loramix.serve.service import Service
from tests.serve.front import running, wait_for
from tests.shop import BANKING


def metrics(front):
    text = front.http.get("/metrics").text
    families = text_string_to_metric_families(text)
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def test_health_and_readiness(front):
    assert front.http.get("/health").json() == {"status": "ok"}
    assert front.http.get("/ready").json() == {"status": "ready"}


def test_metrics_count_what_was_done(front):
    before = metrics(front)
    tokens = sum(
        front.complete(model="sql:0.125").json()["usage"]["completion_tokens"] for _ in range(2)
    )
    front.chat(top_p=2)
    after = metrics(front)

    def grown(*name):
        return after[name] - before.get(name, 0)

    assert grown("loramix_generated_tokens_total") == tokens
    assert grown("loramix_mix_requests_total", ("mix", "sql:0.125")) == 2
    assert grown("loramix_mix_tokens_total", ("mix", "sql:0.125")) == tokens
    path = ("route", "/v1/completions")
    assert grown("loramix_requests_total", path, ("status", "200")) == 2
    path = ("route", "/v1/chat/completions")
    assert grown("loramix_requests_total", path, ("status", "400")) == 1
    assert grown("loramix_time_to_first_token_seconds_count") == 2
    assert grown("loramix_prefix_hit_tokens_total") > 0
    assert grown("loramix_steps_total") > 0
    assert after["loramix_requests_running",] == 0
    info = next(key for key in after if key[0] == "vllm:lora_requests_info")
    assert {label for label, _ in info[1:]} == {
        "max_lora", "running_lora_adapters", "waiting_lora_adapters"
    }  # fmt: skip


def test_mixes_beyond_the_first_hundred_share_a_counter(tmp_path):
    service = Service(LM(FakeEngine(), Library(tmp_path)))
    from loramix.mix import Mix

    for weight in range(1, 300):
        service.meter.answered([Mix({"a": weight / 1000})], 1, 1, 0.1, 0.2)
    mixes = {
        sample.labels["mix"]
        for family in service.meter.registry.collect()
        for sample in family.samples
        if "mix" in sample.labels
    }
    assert len(mixes) == 101
    assert "other" in mixes


@pytest.mark.parametrize("log_prompts", [False, True])
def test_a_log_line_has_the_facts_and_no_text_unless_asked(front, log_prompts, monkeypatch):
    from dataclasses import replace

    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines())
    logger = logging.getLogger("loramix.serve")
    logger.addHandler(handler)
    monkeypatch.setattr(logger, "disabled", False)  # import-linter disables those there are
    level = logger.level
    logger.setLevel(logging.INFO)
    app = front.server.config.app
    app.state.service = replace(front.service, log_prompts=log_prompts)
    try:
        got = front.http.post(
            "/v1/chat/completions",
            json={"messages": [{"role": "user", "content": BANKING}], "max_tokens": 4},
            headers={"x-request-id": "trace-1"},
        )
        assert got.headers["x-request-id"] == "trace-1"
        wait_for(lambda: stream.getvalue())
    finally:
        app.state.service = front.service
        logger.removeHandler(handler)
        logger.setLevel(level)
    line = json.loads(stream.getvalue())
    assert line["trace"] == "trace-1"
    assert (line["status"], line["mix"], line["method"]) == (200, "banking", "POST")
    assert line["completion_tokens"] == got.json()["usage"]["completion_tokens"]
    assert line["first_token_ms"] <= line["ms"]
    assert (BANKING in stream.getvalue()) == log_prompts


def test_an_error_nobody_expected_is_a_500_with_a_trace(tmp_path):
    lm = LM(FakeEngine(), Library(tmp_path))
    with running(Service(lm)) as front:
        lm.engine = None  # a bug, if ever there was one
        got = front.complete()
        assert got.status_code == 500
        assert "the server; its log has more under" in got.json()["error"]["message"]
        assert "NoneType" not in got.text
