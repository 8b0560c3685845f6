"""Changes of one saved router come one after the other, and none is lost."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest

from loramix.errors import RouteError
from loramix.route import saved
from loramix.route.change import changing
from loramix.route.gate import GateRouter
from tests.route.small import fitted

ZOO = {"giraffes": "feed the giraffe", "zebras": "brush the zebra", "lions": "wake the lion"}


@pytest.fixture(scope="module")
def gate() -> GateRouter:
    return fitted()


@pytest.fixture
def folder(gate: GateRouter, tmp_path: Path) -> Path:
    gate.save(tmp_path / "_router")
    return tmp_path / "_router"


def test_adapters_that_join_at_one_time_are_all_known(gate: GateRouter, folder: Path) -> None:
    def join(name: str) -> None:
        with changing(folder):
            GateRouter.load(folder).add(name, [ZOO[name]]).save(folder)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(join, ZOO))
    assert GateRouter.load(folder).fresh == ZOO.keys()


def test_another_process_waits_for_its_turn_and_a_dead_one_holds_none(folder: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from loramix.route.change import changing\n"
        "with changing(Path(sys.argv[1])): print('mine', flush=True); time.sleep(60)"
    )
    words = [sys.executable, "-c", code, str(folder)]
    mine = Event()

    def wait() -> None:
        with changing(folder):
            mine.set()

    with (
        subprocess.Popen(words, stdout=subprocess.PIPE) as other,
        ThreadPoolExecutor(1) as pool,
    ):
        assert other.stdout
        assert other.stdout.readline() == b"mine\n"
        waiting = pool.submit(wait)
        assert not mine.wait(0.2)
        other.kill()
        waiting.result(timeout=20)


def test_a_library_that_cannot_be_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RouteError, match="Cannot change the router"), changing(tmp_path / "file/r"):
        pass


def test_a_router_that_is_replaced_while_it_is_read_is_read_anew(
    gate: GateRouter, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, other = saved._read_facts, gate.add("zebras", ["brush the zebra"])

    def slow(place: Path) -> dict[str, object]:
        facts = read(place)
        if "zebras" not in facts["adapters"]:
            other.save(place)  # arrays and texts are the new one's now
        return facts

    monkeypatch.setattr(saved, "_read_facts", slow)
    assert GateRouter.load(folder).adapters == other.adapters
