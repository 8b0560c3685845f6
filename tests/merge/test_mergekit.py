"""mergekit agrees where its definition is the paper's.

It wants libraries of an older age than ours, so it runs in an environment of its own (see
benchmarks/requirements.txt):

    LORAMIX_MERGEKIT=ENVIRONMENT/bin/python pytest -m slow tests/merge/test_mergekit.py
"""

from __future__ import annotations

import json
import os
import subprocess

import pytest
import torch

from loramix.merge.recipe import Recipe, settings_of
from loramix.merge.stored import open_stored
from loramix.merge.stream import merge_into
from loramix.mix import Mix
from tests.tiny import folded, random_adapter, tiny_base

PYTHON = os.environ.get("LORAMIX_MERGEKIT", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="LORAMIX_MERGEKIT names no python that has mergekit"),
]
RUN = "from mergekit.scripts.run_yaml import main; main()"
TIES, BAND, TOP = {"density": 0.25}, {"density": 0.5, "gamma": 0.0625}, {"select_topk": 0.25}
PAIRS = [  # theirs and ours; shares are whole numbers of entries, which else are rounded otherwise
    ("task_arithmetic", {"normalize": False}, "sum", {}),
    ("ties", TIES, "ties-normalised", TIES),
    ("breadcrumbs", BAND, "breadcrumbs", BAND),
    ("sce", TOP, "sce", TIES),
    ("model_stock", {}, "model-stock", {}),
    ("multislerp", {}, "mean-direction", {}),
    ("nuslerp", {}, "slerp", {}),
]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A base, adapters that agree in part, and a model with each of them in its weights."""
    folder = tmp_path_factory.mktemp("mergekit")
    base = tiny_base("llama")
    one = random_adapter(base.model, "a", rank=4, seed=1)
    two = random_adapter(base.model, "b", rank=4, seed=2)
    for layer, pair in two.pairs.items():
        pair.b.add_(one.pairs[layer].b)
        pair.a.add_(one.pairs[layer].a)
    adapters = {"a": one, "b": two}
    base.model.save_pretrained(folder / "base")
    base.tokenizer.save_pretrained(folder / "base")
    for name in adapters:
        model = folded(base.model, Mix({name: 1}), adapters)
        model.save_pretrained(folder / name)
    return folder, adapters


@pytest.mark.parametrize(("theirs", "given", "method", "settings"), PAIRS)
def test_mergekit_agrees(theirs, given, method, settings, work, tmp_path):
    folder, adapters = work
    equal = theirs in ("sce", "model_stock")
    weights = {"a": 1.0, "b": 1.0} if equal else {"a": 0.75, "b": 0.5}
    recipe = {
        "merge_method": theirs,
        "base_model": str(folder / "base"),
        "models": [
            {"model": str(folder / name), "parameters": {"weight": weight} | given}
            for name, weight in weights.items()
        ],
        "parameters": given,
        "dtype": "float32",
    }
    (tmp_path / "recipe.yml").write_text(json.dumps(recipe))
    command = [PYTHON, "-c", RUN, tmp_path / "recipe.yml", tmp_path / "theirs"]
    subprocess.run(
        [*command, "--no-copy-tokenizer", "--no-write-model-card"],
        env={"PATH": os.environ["PATH"], "HF_HUB_OFFLINE": "1"},
        check=True,
        capture_output=True,
    )
    how = Recipe(Mix(weights), method, settings_of(settings))
    merge_into(folder / "base", adapters, how, tmp_path / "ours")
    places = folder / "base", tmp_path / "theirs", tmp_path / "ours"
    before, other, mine = (open_stored(place).tensors for place in places)
    for layer in adapters["a"].pairs:
        name = f"{layer}.weight"
        rows = [at[name].rows(0, at[name].shape[0]).double() for at in (before, other, mine)]
        expected, found = rows[1] - rows[0], rows[2] - rows[0]
        assert torch.linalg.norm(found - expected) < 0.01 * torch.linalg.norm(expected), layer
