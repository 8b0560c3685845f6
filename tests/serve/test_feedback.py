"""Corrections over HTTP, on a library of their own."""

from __future__ import annotations

import shutil
from pathlib import Path

import loramix
from loramix.serve.service import Service
from tests.serve.front import Front, running
from tests.shop import BANKING, Shop


def test_a_correction_acts_on_the_next_request_until_it_is_undone(
    shop: Shop, tmp_path: Path
) -> None:
    library = tmp_path / "library"
    shutil.copytree(shop.library, library)
    with loramix.open(shop.base, library) as lm, running(Service(lm)) as front:
        made = front.post("/v1/feedback", text=BANKING, right="sql")
        assert made.status_code == 200
        assert front.post("/v1/route", text=BANKING).json()["mix"] == "sql"
        assert front.http.delete(f"/v1/feedback/{made.json()['id']}").status_code == 200
        assert front.post("/v1/route", text=BANKING).json()["mix"] == "banking"
        assert front.post("/v1/feedback", text=BANKING, right="nobody").status_code == 404
        _by_trace(front)
        assert front.http.delete("/v1/feedback/nothing").status_code == 400
        assert front.post("/v1/feedback", text=BANKING).status_code in (400, 422)


def _by_trace(front: Front) -> None:
    """A trace id stands for the text that was routed under it."""
    chat = {"model": "auto", "messages": [{"role": "user", "content": BANKING}], "max_tokens": 1}
    answer = front.post("/v1/chat/completions", **chat)
    chosen = answer.json()["loramix"]
    assert chosen["trace_id"] == answer.headers["x-request-id"]
    assert chosen["nearest"][0]["adapter"] == "banking"
    assert chosen["words"]
    assert 0 <= chosen["coldness"] <= 1
    made = front.post("/v1/feedback", trace_id=chosen["trace_id"], right="sql").json()
    assert made["text"] == BANKING
    routed = front.post("/v1/route", text=BANKING)
    assert routed.json()["trace_id"] == routed.headers["x-request-id"]
    assert routed.json()["mix"] == "sql"
    assert front.http.delete(f"/v1/feedback/{made['id']}").status_code == 200
    assert front.post("/v1/feedback", trace_id="never", right="sql").status_code == 400
    both = {"trace_id": "never", "text": BANKING, "right": "sql"}
    assert front.post("/v1/feedback", **both).status_code == 400
