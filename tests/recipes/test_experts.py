"""Pocket's experts are what experts.yaml says, and it is a file that `loramix train` reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from loramix.cli import app
from loramix.library import Library
from recipes.pocket.__main__ import app as stages
from recipes.pocket.experts import PLAN, SKILLS, install, learn, planned
from recipes.pocket.tasks import TASKS


def write(folder: Path) -> list[str]:
    """A few rows for each expert, and the words that point the file at them."""
    words = []
    for name in TASKS:
        for key, count in (("data", 6), ("eval_data", 2)):
            file = folder / f"{name}-{key}.jsonl"
            row = {"prompt": f"A question for {name}?", "completion": f"its {name} answer"}
            file.write_text("".join(json.dumps(row) + "\n" for _ in range(count)))
            words.append(f"experts.{name}.{key}={file}")
    return words


def test_every_task_has_its_expert_with_its_rows():
    found = planned()
    assert set(found) == set(TASKS) == set(SKILLS)
    for name, expert in found.items():
        assert str(expert.source) == f"build/pocket/rows/{name}.jsonl"
        assert str(expert.validation) == f"build/pocket/rows/{name}-validation.jsonl"
        assert expert.description


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_short_run_of_the_file_puts_all_five_into_a_library(tmp_path):
    words = ["train", str(PLAN), *write(tmp_path), f"output_dir={tmp_path / 'out'}"]
    dry = CliRunner().invoke(app, [*words, "--dry-run"])
    assert dry.exit_code == 0, dry.output
    assert not (tmp_path / "out").exists()
    steps = [f"experts.{name}.max_steps=2" for name in TASKS]
    done = CliRunner().invoke(app, [*words, *steps, f"library={tmp_path / 'library'}"])
    assert done.exit_code == 0, done.output
    learned = Library(tmp_path / "library")
    assert learned.names() == list(TASKS)
    install(tmp_path / "pocket", tmp_path)
    shelf = Library(tmp_path / "pocket/library")
    assert shelf.names() == list(TASKS)
    for name in TASKS:
        own, found = learned.load(name).pairs, shelf.load(name).pairs
        assert all(found[layer].a.dtype == torch.bfloat16 for layer in own)
        assert all(torch.equal(found[layer].b, own[layer].b.bfloat16()) for layer in own)
        card = shelf.card(name)
        assert (card.base, card.examples, card.skills) == ("pocket", (), SKILLS[name])
        assert card.base_fingerprint == learned.card(name).base_fingerprint


def test_learning_is_skipped_where_it_is_done(tmp_path):
    for name in TASKS:
        (tmp_path / "library" / name).mkdir(parents=True)
    learn(tmp_path / "no data", tmp_path / "no pocket", tmp_path)
    assert not (tmp_path / "rows").exists()


def test_every_stage_has_a_name_of_its_own():
    names = [command.name or command.callback.__name__ for command in stages.registered_commands]
    assert len(set(names)) == len(names)
