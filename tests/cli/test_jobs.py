"""Detached trainings: real processes, stopped, killed and resumed."""

import contextlib
import json
import os
import signal
import time
from pathlib import Path

import pytest

import loramix
from loramix.adapter import Adapter
from loramix.cli import main
from loramix.library import Library
from tests.tiny import tiny_base

SOURCE = Path(loramix.__file__).parents[1]


@pytest.fixture
def place(tmp_path, monkeypatch):
    base = tiny_base()
    base.model.save_pretrained(tmp_path / "base")
    base.tokenizer.save_pretrained(tmp_path / "base")
    rows = [{"prompt": f"say {n}", "completion": f"{n} is said"} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(SOURCE))
    monkeypatch.setenv("LORAMIX_DATABASE", f"sqlite:///{tmp_path / 'jobs.db'}")
    monkeypatch.setenv("LORAMIX_LIBRARY", str(tmp_path / "own" / "library"))
    return tmp_path


def words(name, epochs=30):
    return ["train", "--data", "rows.jsonl", "--name", name, "--base", "base",
            f"num_train_epochs={epochs}", "save_strategy=steps", "save_steps=1",
            "fit_router=false", "plot_loss=false"]  # fmt: skip


def begun(capsys, name, epochs=30):
    assert main([*words(name, epochs), "--detach"]) == 0
    return capsys.readouterr().out.strip()


def shown(capsys, id):
    assert main(["jobs", "show", id[:8]]) == 0
    return json.loads(capsys.readouterr().out)


def wait(capsys, id, is_so):
    for _ in range(200):
        job = shown(capsys, id)
        if is_so(job):
            return job
        assert job["state"] in ("queued", "running", "stopped"), job
        time.sleep(0.1)
    raise AssertionError(f"waited too long: {job}")


def has_checkpoint(place, name):
    folder = place / "own" / "training" / name
    return lambda job: job["state"] == "running" and any(folder.glob("checkpoint-*"))


def is_over(job):
    return job["state"] not in ("queued", "running")


def trained(place, name) -> Adapter:
    return Library(place / "own" / "library").load(name)


def same(one, other):
    assert set(one.pairs) == set(other.pairs)
    return all(
        one.pairs[k].a.equal(other.pairs[k].a) and one.pairs[k].b.equal(other.pairs[k].b)
        for k in one.pairs
    )


def test_stopped_killed_and_resumed_it_ends_bit_identical(place, capsys):
    assert main(words("whole")) == 0
    id = begun(capsys, "cut").splitlines()[-1]
    wait(capsys, id, has_checkpoint(place, "cut"))
    assert main(["jobs", "resume", id]) == 1  # it runs
    assert main(["jobs", "delete", id]) == 1
    assert main(["jobs", "stop", id]) == 0
    assert "is stopped" in capsys.readouterr().err
    assert shown(capsys, id)["pid"] is None
    assert main(["jobs", "stop", id]) == 1  # it is over
    assert main(["jobs", "resume", id]) == 0
    job = wait(capsys, id, lambda job: job["pid"] is not None)
    assert os.getsid(job["pid"]) == job["pid"]
    os.kill(job["pid"], signal.SIGKILL)
    lost = wait(capsys, id, is_over)
    assert lost["state"] == "failed"
    assert "killed" in lost["error"]
    assert main(["jobs", "resume", id]) == 0
    assert main(["jobs", "logs", id, "--follow"]) == 0
    assert "Training was stopped after round" in capsys.readouterr().out
    assert shown(capsys, id)["state"] == "done"
    assert same(trained(place, "cut"), trained(place, "whole"))
    assert main(["jobs", "resume", id]) == 1  # it is done
    assert main(["jobs", "delete", id]) == 0
    assert not any((place / "own" / "jobs").iterdir())
    assert main(["jobs", "show", id]) == 1


def helper_of(pid):
    """The other process of a job of two."""
    for _ in range(200):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for child in map(int, children):
            with contextlib.suppress(FileNotFoundError):
                if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                    return child
        time.sleep(0.1)
    raise AssertionError("it has no other process")


@pytest.mark.slow
def test_a_job_of_two_processes_is_stopped_killed_and_resumed(place, capsys):
    assert main([*words("whole"), "processes=2"]) == 0
    assert main([*words("cut"), "processes=2", "--detach"]) == 0
    id = capsys.readouterr().out.strip().splitlines()[-1]
    job = wait(capsys, id, has_checkpoint(place, "cut"))
    helper = helper_of(job["pid"])
    assert main(["jobs", "stop", id]) == 0
    assert "is stopped" in capsys.readouterr().err
    with pytest.raises(ProcessLookupError):
        os.kill(helper, 0)
    assert main(["jobs", "resume", id]) == 0
    job = wait(capsys, id, lambda job: job["pid"] is not None)
    os.kill(helper_of(job["pid"]), signal.SIGKILL)
    lost = wait(capsys, id, lambda job: is_over(job) and job["state"] != "stopped")
    assert lost["state"] == "failed"
    assert "was ended by signal 9; the run goes on from its newest checkpoint" in lost["error"]
    assert main(["jobs", "resume", id]) == 0
    job = wait(capsys, id, lambda job: job["pid"] is not None)
    helper = helper_of(job["pid"])
    os.kill(job["pid"], signal.SIGKILL)
    wait(capsys, id, is_over)
    wait_gone(helper)
    assert main(["jobs", "resume", id]) == 0
    assert main(["jobs", "logs", id, "--follow"]) == 0
    capsys.readouterr()
    assert shown(capsys, id)["state"] == "done"
    assert same(trained(place, "cut"), trained(place, "whole"))


def wait_gone(pid):
    for _ in range(200):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError(f"{pid} lives on")


def test_a_job_that_fails_says_why(place, capsys):
    (place / "rows.jsonl").write_text("{}\n")
    job = wait(capsys, begun(capsys, "bad").splitlines()[-1], is_over)
    assert job["state"] == "failed"
    assert "no known shape" in job["error"]
    assert main(["jobs", "list"]) == 0
    assert "failed" in capsys.readouterr().out
