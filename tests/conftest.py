"""What several tests share: tiny random models, random adapters, the folder of real data."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # read when transformers is imported

from tests.tiny import ARCHITECTURES

if TYPE_CHECKING:
    from tests.shop import Shop


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Real adapters, configs, tokenizers and datasets that are not part of this project.

    `LORAMIX_DATA` names the folder; without it, `shared/data` beside the checkout is tried. Tests
    that need it are skipped where there is none; synthesised twins cover the same layouts.
    """
    checkout = Path(__file__).parents[1]
    given = os.environ.get("LORAMIX_DATA")
    places = (
        [Path(given)] if given else [p / "shared" / "data" for p in (checkout.parent, checkout)]
    )
    for place in places:
        if place.is_dir():
            return place
    pytest.skip("no folder of real data (set LORAMIX_DATA)")


@pytest.fixture(autouse=True)
def _own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test touches the user's own keys, conversations and copy of pocket's library."""
    monkeypatch.setenv("LORAMIX_DATABASE", f"sqlite:///{tmp_path}/own.db")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    """Each architecture of tests/tiny.py in turn."""
    return str(request.param)


@pytest.fixture(scope="session")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    """A tiny base, a library and its router on disk; tests leave it as it is."""
    from tests.shop import build

    return build(tmp_path_factory.mktemp("shop"))
