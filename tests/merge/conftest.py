"""A base on disk that the tests of merging share."""

from __future__ import annotations

import pytest

from tests.merge.bases import save, two
from tests.tiny import tiny_base


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A float32 model in several files, its folder, and two adapters."""
    base = tiny_base("llama")
    folder = save(base, tmp_path_factory.mktemp("llama") / "base")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return base, folder, two(base.model)
