"""Datasets of the hub, read by the real `datasets` from a small hub on loopback."""

from __future__ import annotations

import json

import pytest

from loramix.errors import TrainError
from loramix.train.online import fetch_rows, is_hub_source
from loramix.train.recipe import plan
from tests.formats.test_hub import COMMIT, Hub, handler
from tests.served import served

PAIRS = [{"prompt": f"say {n}", "completion": f"{n} is said"} for n in range(4)]
TALKS = [
    {"talk": [{"who": "me", "what": f"ask {n}"}, {"who": "it", "what": f"say {n}"}]}
    for n in range(3)
]
README = """---
configs:
- config_name: default
  data_files: pairs.jsonl
- config_name: few
  data_files: [{split: test, path: few.json}]
- config_name: talks
  data_files: talks.json
---
"""
ENTRIES = {
    "pairs": {
        "hf_hub_url": "good/rows",
        "columns": {"prompt": "prompt", "response": "completion"},
        "num_samples": 3,
    },
    "talks": {
        "hf_hub_url": "good/rows@v1",
        "subset": "talks",
        "formatting": "sharegpt",
        "columns": {"messages": "talk"},
        "tags": {
            "role_tag": "who",
            "content_tag": "what",
            "user_tag": "me",
            "assistant_tag": "it",
        },
    },
    "test": {
        "hf_hub_url": "good/rows",
        "subset": "few",
        "split": "test",
        "columns": {"prompt": "q", "response": "a"},
    },
    "no split": {"hf_hub_url": "good/rows", "split": "dev"},
    "no subset": {"hf_hub_url": "good/rows", "subset": "poems"},
    "nobody": {"hf_hub_url": "nobody/nothing"},
    "no revision": {"hf_hub_url": "good/rows@v9"},
    "gated": {"hf_hub_url": "gated/rows"},
    "other": {"hf_hub_url": "good/elsewhere"},
}
READ = """
import json, sys
from pathlib import Path
from loramix.errors import TrainError
from loramix.train.dataset import load_named
for name in sys.argv[2:]:
    try:
        found = load_named([name], Path(sys.argv[1]))
        told = [[(m.role, m.content) for m in s.example.messages] for s in found.samples]
        print(json.dumps([told, [str(p) for p in found.problems], list(found.notes)[-1]]))
    except TrainError as error:
        print(json.dumps(str(error)))
"""


@pytest.fixture
def hub(tmp_path):
    files = {
        "README.md": README.encode(),
        "pairs.jsonl": "".join(json.dumps(row) + "\n" for row in PAIRS).encode(),
        "few.json": b'[{"q": "why", "a": "because"}]',
        "talks.json": json.dumps(TALKS).encode(),
        "loader.py": b"raise SystemExit('code of a repository was run')",
    }
    hub = Hub(files, tmp_path / "cache")
    with served(handler(hub)) as hub.url:
        yield hub


def read(hub, folder, *names, **environment):
    """What each dataset of the registry gives, or the error, as a process with the real client."""
    (folder / "dataset_info.json").write_text(json.dumps(ENTRIES))
    status, lines = hub.run(READ, str(folder), *names, **environment)
    assert status == 0
    return dict(zip(names, map(json.loads, lines.splitlines()), strict=True))


def test_datasets_are_read_at_a_commit_and_from_the_cache_without_the_hub(hub, tmp_path):
    found = read(hub, tmp_path, *(ENTRIES.keys() - {"other"}))
    assert not isinstance(found["pairs"], str), found
    pairs, problems, note = found["pairs"]
    assert pairs[2] == [["user", "say 2"], ["assistant", "2 is said"]]
    assert (len(pairs), problems) == (3, [])
    assert note == f"good/rows (train) was read at commit {COMMIT}."
    assert found["talks"][0][1] == [["user", "ask 1"], ["assistant", "say 1"]]
    assert found["test"][0] == [[["user", "why"], ["assistant", "because"]]]
    assert any("/v1" in path for path in hub.asked)
    for name, message in {
        "no split": "Cannot read the dataset good/rows (Unknown split",
        "no subset": "Cannot read the dataset good/rows (BuilderConfig 'poems' not found",
        "nobody": "The hub has no nobody/nothing; check the spelling, or set HF_TOKEN",
        "no revision": "good/rows has no revision 'v9'",
        "gated": "gated/rows is gated",
    }.items():
        assert found[name].startswith(message), found[name]
    asked = len(hub.asked)
    offline = read(hub, tmp_path, "pairs", "talks", "other", HF_HUB_OFFLINE="1")
    assert len(hub.asked) == asked
    assert "multiple 'good/rows' configurations" in offline["pairs"]  # it names none
    assert offline["talks"][0] == found["talks"][0]
    assert offline["talks"][2].endswith("was read from the cache, as the hub is not asked.")
    assert "fetch it once with the network" in offline["other"]


def test_what_names_a_file_is_no_dataset_of_the_hub():
    assert is_hub_source("me/rows")
    assert is_hub_source("me/rows@v1.0")
    for text in ("rows", "me/rows.jsonl", "me/rows.csv.gz", "./me/rows", "a/b/c"):
        assert not is_hub_source(text)
    values = {"model_name_or_path": "pocket", "output_dir": "out", "data": "me/rows@v1"}
    assert plan(values).experts[0].source.hub == "me/rows@v1"
    with pytest.raises(TrainError, match="is no hub id"):
        fetch_rows("rows", None, "train")
