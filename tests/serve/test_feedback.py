"""Corrections over HTTP, on a library of their own."""

from __future__ import annotations

import shutil
from pathlib import Path

import loramix
from loramix.serve.service import Service
from tests.serve.front import running
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
        assert front.http.delete("/v1/feedback/nothing").status_code == 400
        assert front.post("/v1/feedback", text=BANKING).status_code in (400, 422)
