"""A training file becomes experts in the library, a router that knows them, and a table."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from loramix.base import open_base
from loramix.cli import main
from loramix.errors import AdapterError, TrainError
from loramix.formats.readme import describe, render
from loramix.jobs import learn, open_planned, taken_up
from loramix.library import Library
from loramix.lm import has_router, load_router
from loramix.material import gather
from loramix.train.log import entries
from loramix.train.loop import Stopped
from loramix.train.recipe import read_plan
from tests.tiny import tiny_base

GOLDEN = Path(__file__).parent / "train" / "golden"


@pytest.fixture(scope="session")
def saved_base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    base = tiny_base(max_position_embeddings=2048)
    base.model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with rows for two experts, where the commands run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORAMIX_LIBRARY", str(tmp_path / "library"))
    for name, words in {"colours": "red green blue", "sounds": "miaow woof cluck"}.items():
        rows = [
            {"prompt": f"{name} {word} {n}", "completion": word}
            for n in range(6)
            for word in words.split()
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def planned(base, *changes):
    return read_plan(GOLDEN / "experts.yaml", [f"model_name_or_path={base}", *changes])


def test_two_experts_are_learned_kept_routed_to_and_judged(place, saved_base):
    plan, said = planned(saved_base, "plot_loss=true", "report_to=tensorboard"), []
    base = open_planned(plan)
    outcome = learn(plan, base, gather(plan, base), report=said.append)
    shelf = Library(place / "library")
    assert shelf.names() == ["colours", "sounds"]
    card = shelf.card("sounds")
    assert card.base_fingerprint == base.fingerprint
    assert card.examples[0].startswith("sounds")
    for one in outcome.judged:
        assert one.expert < one.base
        assert one.routed is not None
        assert shelf.card(one.name).scores["validation_loss"] == round(one.expert, 4)
    assert has_router(shelf)
    assert load_router(shelf).adapters == ("colours", "sounds")
    log = entries(place / "build/experts/trainer_log.jsonl")
    assert {entry["expert"] for entry in log} == {"colours", "sounds"}
    lines = {"current_steps", "total_steps", "epoch", "percentage", "elapsed_time"}
    assert all(lines <= entry.keys() for entry in log)
    assert "</svg>" in (place / "build/experts/loss.svg").read_text()
    assert {run.name for run in (place / "build/experts/runs").iterdir()} == {"colours", "sounds"}
    shown = render(describe(shelf.path("sounds")))
    assert "](loss.svg)" in shown
    assert "| data | sounds.jsonl |" in shown
    with pytest.raises(AdapterError, match="has colours, sounds already"):
        learn(plan, base, gather(plan, base))


def test_a_stopped_run_goes_on_and_its_log_too(place, saved_base):
    plan = planned(saved_base, "logging_steps=1", "fit_router=false")
    base = open_planned(plan)
    rounds = iter(range(1, 99))
    halted = dataclasses.replace(plan.run, stopped=lambda: next(rounds) == 3)
    with pytest.raises(Stopped):
        learn(dataclasses.replace(plan, run=halted), base, gather(plan, base))
    assert not Library(place / "library").names()
    learn(plan, base, gather(plan, base))
    log = entries(place / "build/experts/trainer_log.jsonl")
    steps = [e["current_steps"] for e in log if e["expert"] == "colours" and "loss" in e]
    assert steps == list(range(1, steps[-1] + 1))
    whole = Library(place / "library").load("sounds").digest
    shutil.rmtree(place / "library")
    shutil.rmtree(place / "build")
    learn(plan, base, gather(plan, base))
    assert Library(place / "library").load("sounds").digest == whole


def test_an_overwriting_run_takes_up_the_checkpoint_that_it_is_told_to(place, saved_base):
    words = ["fit_router=false", "overwrite_output_dir=true", "save_steps=1", "save_total_limit=9"]
    plan = planned(saved_base, *words)
    base = open_planned(plan)
    with pytest.raises(TrainError, match="resume_from_checkpoint is true and build/experts has no"):
        learn(dataclasses.replace(plan, resume=True), base, gather(plan, base))
    learn(plan, base, gather(plan, base))
    whole = Library(place / "library").load("sounds").digest
    oldest = sorted((place / "build/experts").glob("checkpoint-*"))[0]
    seen = []
    again = planned(saved_base, *words, f"resume_from_checkpoint={oldest}")
    learn(again, base, gather(again, base), seen.append)
    assert seen[0].step == int(oldest.name[-8:]) + 1
    assert Library(place / "library").load("sounds").digest == whole
    assert taken_up(again).run.resume_from is None  # a job goes on from its own newest one
    elsewhere = dataclasses.replace(again, output=place / "new")
    assert taken_up(elsewhere).run.resume_from == oldest


def test_an_expert_goes_on_from_one_of_the_library_or_is_learned_over_it(place, saved_base, capsys):
    words = ["train", "--data", "colours.jsonl", "--base", str(saved_base), "fit_router=false"]
    assert main([*words, "--name", "first", "lora_rank=6"]) == 0, capsys.readouterr().err
    assert main([*words, "--name", "more", "adapter_name_or_path=first"]) == 0
    assert "more goes on from first, and has its layers, its rank 6 and its scale 1" in (
        capsys.readouterr().err
    )
    above = ["adapter_name_or_path=first,library/more", "create_new_adapter=true", "lora_rank=3"]
    assert main([*words, "--name", "above", *above]) == 0, capsys.readouterr().err
    shelf = Library(place / "library")
    assert [shelf.load(name).rank for name in ("first", "more", "above")] == [6, 6, 15]
    told = json.loads((shelf.path("above") / "training.json").read_text(encoding="utf-8"))
    assert told["begun_from"] == ["first", "more"]
    losses = [shelf.card(name).scores["validation_loss"] for name in ("first", "more", "above")]
    assert losses[1] < losses[0]
    assert losses[2] < losses[0]
    assert main([*words, "--name", "x", "adapter_name_or_path=none"]) == 1
    assert "none does not exist; expected" in capsys.readouterr().err


def test_a_whole_model_is_written_after_training_and_by_a_file_that_only_merges(
    place, saved_base, capsys
):
    trained = ["train", "--data", "colours.jsonl", "--base", str(saved_base), "fit_router=false"]
    assert main([*trained, "--name", "colours", "export_dir=whole"]) == 0, capsys.readouterr().err
    assert "A whole model is in whole." in capsys.readouterr().err
    merging = [
        *("train", str(GOLDEN / "merge.yaml"), f"model_name_or_path={saved_base}"),
        *("adapter_name_or_path=colours", "export_dir=merged"),
    ]
    assert main(merging) == 0, capsys.readouterr().err
    shown = capsys.readouterr().out
    assert shown == f"colours and {saved_base} as one model in merged\n"
    base, whole, merged = (open_base(str(path)) for path in (saved_base, "whole", "merged"))
    expert = Library(place / "library").load("colours")
    for layer, pair in expert.pairs.items():
        weight = base.model.get_submodule(layer).weight
        torch.testing.assert_close(
            whole.model.get_submodule(layer).weight, weight + pair.delta(weight)
        )
    assert whole.fingerprint == merged.fingerprint
    assert main(merging) == 1
    assert "merged is there already; give another export_dir" in capsys.readouterr().err
    assert main([*merging, "overwrite_output_dir=true"]) == 0
    assert main([*trained, "--name", "more", "export_dir=whole"]) == 1
    assert "whole is there already" in capsys.readouterr().err


def test_bad_rows_are_refused_with_their_lines_before_anything_is_learned(place, saved_base):
    with (place / "sounds.jsonl").open("a") as file:
        file.write('\n{"prompt": "x", "completion": ""}\n{"prompt": "y"')
    plan = planned(saved_base)
    base = open_planned(plan)
    with pytest.raises(TrainError, match=r"2 of 20 rows .* line 19: .* line 20: not JSON"):
        gather(plan, base)
    kept = gather(dataclasses.replace(plan, max_bad=0.2), base)
    assert [problem.line for problem in kept[1].problems] == [19, 20]


def test_llama_factorys_own_file_and_data_run_unchanged(place, saved_base, data_dir, capsys):
    words = [
        *("train", str(GOLDEN / "lora_sft.yaml"), f"model_name_or_path={saved_base}"),
        *(
            f"dataset_dir={data_dir / 'llamafactory_demo'}",
            "max_samples=12",
            "cutoff_len=256",
            "fit_router=false",
        ),
    ]
    assert main(words) == 0, capsys.readouterr().err
    assert Library(place / "library").names() == ["sft"]
    assert "trust_remote_code is passed over" in capsys.readouterr().err


def test_a_file_of_rows_is_enough(place, saved_base, capsys):
    words = ["train", "--data", "colours.jsonl", "--name", "colours", "--base", str(saved_base)]
    assert main([*words, "--dry-run", "--preview", "1"]) == 0
    shown = capsys.readouterr().out
    assert "Nothing was trained" in shown
    assert "[[red</s>]]" in shown or "[[green</s>]]" in shown or "[[blue</s>]]" in shown
    assert "Memory: about" in shown
    assert not (place / "library").exists()
    assert main([*words, "num_train_epochs=1", "fit_router=false"]) == 0
    assert "colours in" in capsys.readouterr().out
    assert main(words) == 1
    assert "overwrite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "Give one training file, or --data"),
        (["a.yaml", "b.yaml"], "Give one training file"),
        (["--data", "colours.jsonl"], "--data needs --name"),
        (["a.yaml", "--name", "x"], "--name is for --data"),
        (["a.yaml"], "a.yaml does not exist"),
        (["--data", "c.jsonl", "--name", "a+b"], "a+b"),
        (["--data", "colours.jsonl", "--name", "x", "lora_rnk=3"], "Did you mean 'lora_rank'"),
    ],
)
def test_a_command_that_cannot_be_meant_says_so(place, words, expected, capsys):
    assert main(["train", *words]) == 1
    assert expected in capsys.readouterr().err


def test_data_is_checked_shown_and_converted(place, saved_base, capsys):
    with (place / "colours.jsonl").open("a") as file:
        file.write("\nbroken")
    base = ["--base", str(saved_base)]
    assert main(["data", "check", "colours.jsonl", *base]) == 1
    assert "line 19: not JSON" in capsys.readouterr().err
    assert main(["data", "check", "colours.jsonl", "--max-bad", "0.1", *base]) == 0
    assert "bad rows         1" in capsys.readouterr().out
    assert main(["data", "preview", "colours.jsonl", "--rows", "1", *base]) == 0
    assert "<user>colours red 0</s><assistant>[[red</s>]]" in capsys.readouterr().out
    assert main(["data", "convert", "sounds.jsonl", "out.jsonl"]) == 0
    row = json.loads((place / "out.jsonl").read_text().splitlines()[0])
    assert row["messages"][1] == {"role": "assistant", "content": "miaow"}
    assert main(["data", "convert", "sounds.jsonl", "out.jsonl"]) == 1
    assert "exists" in capsys.readouterr().err
