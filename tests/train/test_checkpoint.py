"""A run that was cut short ends as if nothing had happened, to the bit."""

from __future__ import annotations

import dataclasses
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from loramix.errors import TrainError
from loramix.train.checkpoint import found
from loramix.train.config import Run
from loramix.train.loop import Stopped, train
from tests.tiny import tiny_base
from tests.train.small import COLOURS, SETTINGS, SOUNDS, course

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys
from pathlib import Path
from safetensors.torch import save_file
from loramix.train.config import Run
from loramix.train.loop import train
from tests.tiny import tiny_base
from tests.train.test_checkpoint import courses
folder = Path(sys.argv[1])
base = tiny_base()
print("ready", flush=True)
experts = train(base, courses(base), Run(folder=folder, save_every=1))
named = {f"{e.name}.{n}": p for e in experts for n, p in e.pairs.items()}
save_file({f"{n}.{k}": getattr(p, k) for n, p in named.items() for k in "ab"}, sys.argv[2])
"""


def courses(base):
    changed = dataclasses.replace(SETTINGS, dropout=0.1, epochs=6, validate_every=4)
    dora = dataclasses.replace(SETTINGS, dora=True, epochs=2, b_ratio=4.0, weight_decay=0.1)
    return [course(base, "a", COLOURS, changed), course(base, "b", SOUNDS, dora)]


def same(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        assert one.digest == other.digest


def test_a_run_stopped_after_any_round_ends_bit_identical(tmp_path):
    whole = train(tiny_base(), courses(tiny_base()))
    for stop in range(1, 12):
        folder, rounds = tmp_path / str(stop), iter(range(1, 99))
        run = Run(folder=folder, save_every=99, stopped=lambda: next(rounds) == stop)  # noqa: B023
        with pytest.raises(Stopped, match=f"round {stop}; its state is in"):
            train(tiny_base(), courses(tiny_base()), run)
        same(train(tiny_base(), courses(tiny_base()), Run(folder=folder)), whole)


def test_a_finished_run_is_not_trained_again(tmp_path):
    run = Run(folder=tmp_path)
    first = train(tiny_base(), courses(tiny_base()), run)
    steps = []
    same(train(tiny_base(), courses(tiny_base()), run, report=steps.append), first)
    assert not steps


def test_the_last_checkpoints_are_kept(tmp_path):
    train(tiny_base(), courses(tiny_base()), Run(folder=tmp_path, save_every=1, keep=3))
    assert [place.name[-2:] for place in found(tmp_path)] == ["10", "11", "12"]
    assert len(list(tmp_path.iterdir())) == 3


def test_a_share_of_the_rounds_may_be_kept(tmp_path):
    train(tiny_base(), courses(tiny_base()), Run(folder=tmp_path, save_every=0.25, keep=9))
    assert [int(place.name[-2:]) for place in found(tmp_path)] == [3, 6, 9, 12]


def test_a_checkpoint_of_another_run_is_not_taken_up(tmp_path):
    train(tiny_base(), courses(tiny_base()), Run(folder=tmp_path))
    with pytest.raises(TrainError, match="of a run with other rows, settings or another base"):
        train(tiny_base(), courses(tiny_base())[:1], Run(folder=tmp_path))
    with pytest.raises(TrainError, match="another base"):
        train(tiny_base(seed=1), courses(tiny_base(seed=1)), Run(folder=tmp_path))


def test_a_damaged_checkpoint_is_named(tmp_path):
    train(tiny_base(), courses(tiny_base()), Run(folder=tmp_path))
    (found(tmp_path)[-1] / "state.safetensors").write_bytes(b"half")
    with pytest.raises(TrainError, match="checkpoint-00000012 is damaged"):
        train(tiny_base(), courses(tiny_base()), Run(folder=tmp_path))


def test_a_run_goes_on_from_the_checkpoint_that_is_named(tmp_path):
    whole = train(
        tiny_base(), courses(tiny_base()), Run(folder=tmp_path / "a", save_every=1, keep=9)
    )
    place, steps = tmp_path / "a" / "checkpoint-00000005", []
    elsewhere = Run(folder=tmp_path / "b", resume_from=place)
    same(train(tiny_base(), courses(tiny_base()), elsewhere, steps.append), whole)
    assert steps[0].step == 6
    again = Run(
        folder=tmp_path / "a", resume_from=place, save_every=1, keep=2, stopped=lambda: True
    )
    with pytest.raises(Stopped, match="after round 6"):
        train(tiny_base(), courses(tiny_base()), again)
    kept = [int(each.name[-2:]) for each in found(tmp_path / "a")]
    assert kept == [5, 6, 7, 8, 9, 10, 11, 12]  # what is newer is not for this run to delete


def test_a_checkpoint_of_another_program_is_no_checkpoint(tmp_path):
    (tmp_path / "checkpoint-500").mkdir()
    run = Run(folder=tmp_path / "run", resume_from=tmp_path / "checkpoint-500")
    with pytest.raises(TrainError, match=r"is no checkpoint of loramix: .* adapter_name_or_path"):
        train(tiny_base(), courses(tiny_base()), run)


def killed_at_random(tmp_path, kills, seed):
    """Run the program, killing it again and again; what the whole run would have made."""
    rng = random.Random(seed)
    script, out = tmp_path / "program.py", tmp_path / "experts.safetensors"
    tmp_path.mkdir(exist_ok=True)
    script.write_text(PROGRAM, encoding="utf-8")
    words = [sys.executable, str(script), str(tmp_path / "run"), str(out)]
    hits = 0
    while not out.exists():
        process = subprocess.Popen(
            words,
            stdout=subprocess.PIPE,
            env={"PYTHONPATH": f"{ROOT}:{ROOT / 'src'}", "PATH": "", "OMP_NUM_THREADS": "1"},
        )
        assert process.stdout is not None
        process.stdout.readline()
        if hits < kills:
            time.sleep(rng.uniform(0.0, 0.25))
            process.send_signal(signal.SIGKILL)
            hits += 1
        process.stdout.close()
        process.wait()
    return hits, out


def check_killed(tmp_path, kills):
    from safetensors.torch import load_file

    hits, out = killed_at_random(tmp_path, kills, seed=kills)
    assert hits
    ended = load_file(out)
    for expert in train(tiny_base(), courses(tiny_base())):
        for name, pair in expert.pairs.items():
            assert torch.equal(ended[f"{expert.name}.{name}.a"], pair.a)
            assert torch.equal(ended[f"{expert.name}.{name}.b"], pair.b)


def test_a_run_that_is_killed_ends_bit_identical(tmp_path):
    check_killed(tmp_path, kills=2)


@pytest.mark.slow
def test_a_run_that_is_killed_twenty_times_ends_bit_identical(tmp_path):
    for n in range(10):
        check_killed(tmp_path / str(n), kills=2)
