"""One directory: complete or not there, never executed, refused when it does not fit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from loramix.chat import Message
from loramix.errors import AdapterError, RouteError
from loramix.route import saved
from loramix.route.encode import MINILM_SHA256, NgramEncoder
from loramix.route.gate import GateRouter
from loramix.route.ngrams import Floats
from tests.route.small import fitted, held_out, train


class Letters:
    """A sentence encoder for tests: counts of letters, unit length."""

    digest = "letters-1"
    calls = 0

    def encode(self, texts: Sequence[str]) -> Floats:
        self.calls += len(texts)
        counts = [[text.count(chr(97 + i)) + 1e-3 for i in range(26)] for text in texts]
        rows = np.asarray(counts, np.float32).reshape(len(texts), 26)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def router() -> GateRouter:
    return fitted()


@pytest.fixture
def folder(router: GateRouter, tmp_path: Path) -> Path:
    router.save(tmp_path / "router")
    return tmp_path / "router"


QUERIES = [text for group in held_out().values() for text in group]


def test_a_loaded_router_decides_alike(router: GateRouter, folder: Path) -> None:
    loaded = GateRouter.load(folder)
    np.testing.assert_allclose(loaded.scores(QUERIES), router.scores(QUERIES), atol=2e-2)
    decisions = [[r.route([Message("user", q)]) for q in QUERIES] for r in (router, loaded)]
    assert [str(d.mix) for d in decisions[0]] == [str(d.mix) for d in decisions[1]]
    assert loaded.abstain == router.abstain
    assert loaded.examples == router.examples


def test_saving_a_loaded_router_writes_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    GateRouter.load(folder).save(tmp_path / "again")
    for name in (saved.FACTS, saved.EXAMPLES):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    with np.load(folder / saved.ARRAYS) as a, np.load(tmp_path / "again" / saved.ARRAYS) as b:
        assert a.files == b.files
        assert all((a[name] == b[name]).all() for name in a.files)


def test_a_loaded_router_can_be_extended(router: GateRouter, folder: Path) -> None:
    loaded = GateRouter.load(folder).remove("garden")
    expected = router.remove("garden")
    np.testing.assert_allclose(loaded.scores(QUERIES), expected.scores(QUERIES), atol=1e-3)
    assert loaded.refit().scores(QUERIES) == expected.refit().scores(QUERIES)


def test_saving_again_replaces_and_leaves_nothing_else(router: GateRouter, folder: Path) -> None:
    router.remove("garden").save(folder)
    assert GateRouter.load(folder).adapters == ("baking", "sailing")
    assert [p.name for p in folder.parent.iterdir()] == ["router"]
    assert sorted(p.name for p in folder.iterdir()) == [saved.ARRAYS, saved.EXAMPLES, saved.FACTS]


def test_a_failed_save_keeps_the_old_router(
    router: GateRouter, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(AdapterError, match="disk full"):
        router.remove("garden").save(folder)
    assert GateRouter.load(folder).adapters == router.adapters
    assert [p.name for p in folder.parent.iterdir()] == ["router"]


@pytest.mark.parametrize("name", [saved.FACTS, saved.ARRAYS, saved.EXAMPLES])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "noise"])
def test_damage_is_an_error_of_one_line(folder: Path, name: str, damage: str) -> None:
    path = folder / name
    data = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(
            {"empty": b"", "cut": data[: len(data) // 2], "noise": b"\x80\x04K."}[damage]
        )
    with pytest.raises(RouteError) as caught:
        GateRouter.load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("place", [0.1, 0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("name", [saved.ARRAYS, saved.EXAMPLES])
def test_a_flipped_byte_is_an_error_of_one_line(folder: Path, name: str, place: float) -> None:
    data = bytearray((folder / name).read_bytes())
    data[int(place * len(data))] ^= 0xFF
    (folder / name).write_bytes(data)
    with pytest.raises(RouteError, match="damaged"):
        GateRouter.load(folder)


@pytest.mark.parametrize(
    "change",
    [{"adapters": ["baking"]}, {"blend": {"share": None}}, {"top": "two"}, {"abstain": []}],
)
def test_facts_that_do_not_fit_the_arrays_are_damage(
    folder: Path, change: dict[str, object]
) -> None:
    facts = json.loads((folder / saved.FACTS).read_text())
    (folder / saved.FACTS).write_text(json.dumps({**facts, **change}))
    with pytest.raises(RouteError, match="damaged"):
        GateRouter.load(folder)


def test_another_format_is_refused(folder: Path) -> None:
    facts = json.loads((folder / saved.FACTS).read_text())
    (folder / saved.FACTS).write_text(json.dumps({**facts, "format": 99}))
    with pytest.raises(RouteError, match="fit the router again"):
        GateRouter.load(folder)


def test_another_encoder_is_refused(folder: Path) -> None:
    with pytest.raises(RouteError, match="fitted with the encoder ngrams"):
        GateRouter.load(folder, encoder=Letters())


def test_a_missing_sentence_encoder_says_what_to_install(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = json.loads((folder / saved.FACTS).read_text())
    (folder / saved.FACTS).write_text(json.dumps({**facts, "encoder": MINILM_SHA256}))
    monkeypatch.setattr("loramix.route.encode._packaged", lambda: None)
    with pytest.raises(RouteError, match="pip install"):
        GateRouter.load(folder)
    with pytest.raises(RouteError, match="pip install"):
        GateRouter.load(folder, encoder=NgramEncoder())


def test_vectors_are_kept_so_nothing_is_encoded_twice(tmp_path: Path) -> None:
    letters = Letters()
    router = fitted(train(), encoder=letters)
    router.save(tmp_path / "r")
    before = letters.calls
    loaded = GateRouter.load(tmp_path / "r", encoder=letters)
    assert letters.calls == before
    np.testing.assert_allclose(loaded.scores(QUERIES), router.scores(QUERIES), atol=2e-2)
    before = letters.calls
    grown = loaded.add("zoo", ["feed the giraffe", "see the zebra"])
    assert letters.calls == before + 2
    assert grown.adapters == ("baking", "garden", "sailing", "zoo")


def test_blending_uses_both_halves() -> None:
    router = fitted(train(), encoder=Letters())
    assert router.gate.vectors is not None
    assert 0 < router.gate.blend.share < 1
    hits = [router.route([Message("user", q)]).mix for q in QUERIES]
    own = [name for name, group in held_out().items() for _ in group]
    assert np.mean([str(h) == o for h, o in zip(hits, own, strict=True)]) > 0.8
