"""Experts that several processes learn are those that one learns."""

from __future__ import annotations

import dataclasses
import os
import signal
from functools import partial

import pytest
import torch

from loramix.errors import TrainError
from loramix.mix import Mix
from loramix.train.checkpoint import found
from loramix.train.config import Run
from loramix.train.loop import Stopped, train
from loramix.train.measure import mean_loss
from loramix.train.processes import MEETING, Processes, check_launcher, together
from loramix.train.sharding import check_shardable, shard
from tests.tiny import tiny_base
from tests.train.small import COLOURS, SETTINGS, SOUNDS, course


def courses(base):
    odd = dataclasses.replace(SETTINGS, batch_size=3, epochs=5, validate_every=2)
    single = dataclasses.replace(SETTINGS, batch_size=1, max_steps=6, dora=True, b_ratio=4.0)
    return [course(base, "a", SOUNDS, odd), course(base, "b", COLOURS, single)]


def learned(run):
    base, seen = tiny_base(), []
    return train(base, courses(base), run, seen.append), seen


def assist(folder, processes, *, dies_at=None):
    """What the other process of a run does here."""
    rounds = iter(range(1, 99))

    def stopped():
        if next(rounds) == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return False

    learned(Run(folder=folder, save_every=1, processes=processes, stopped=stopped))


def by_two(folder, **changes):
    with together(2, partial(assist, folder)) as processes:
        return learned(Run(folder=folder, save_every=1, processes=processes, **changes))


def alike(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        for name, pair in one.pairs.items():
            torch.testing.assert_close(pair.a, other.pairs[name].a, rtol=0, atol=1e-5)
            torch.testing.assert_close(pair.b, other.pairs[name].b, rtol=0, atol=1e-5)


def test_two_processes_learn_what_one_does(tmp_path):
    whole, steps = learned(Run())
    experts, seen = by_two(tmp_path / "whole")
    alike(experts, whole)
    for one, other in zip(seen, steps, strict=True):
        assert (one.name, one.step) == (other.name, other.step)
        assert one.loss == pytest.approx(other.loss, rel=1e-5)
        assert (one.validation is None) == (other.validation is None)
        if one.validation is not None:
            assert one.validation == pytest.approx(other.validation, rel=1e-5)


MIXES = [Mix({"a": 1.0}), Mix(), Mix({"a": 0.5, "b": 2.0})]


def plain(base):
    odd = dataclasses.replace(SETTINGS, batch_size=3, epochs=5, validate_every=2)
    single = dataclasses.replace(SETTINGS, batch_size=1, max_steps=6)
    return [course(base, "a", SOUNDS, odd), course(base, "b", COLOURS, single)]


def spread(processes):
    """What one process learns over a whole base, and over one that is spread, and judges by it."""
    base, seen = tiny_base(), []
    whole = train(base, plain(base), Run(processes=processes))
    run = Run(sharded=True, processes=processes, checkpointing=True)
    experts = train(base, plain(base), run, seen.append)
    loss = mean_loss(base, experts, plain(base)[0].validation, processes.agreed(MIXES))
    held = sum(weight.to_local().numel() for weight in base.model.parameters())
    return whole, experts, seen, loss, held


def test_two_processes_that_share_a_base_learn_what_two_whole_ones_do_to_the_bit():
    base, steps = tiny_base(), []
    alone = train(base, plain(base), Run(), steps.append)
    wanted = mean_loss(base, alone, plain(base)[0].validation, MIXES)
    with together(2, spread) as processes:
        whole, experts, seen, loss, held = spread(processes)
    assert [one.digest for one in experts] == [one.digest for one in whole]
    alike(experts, alone)
    size = sum(weight.numel() for weight in base.model.parameters())
    assert held == pytest.approx(size / 2, rel=0.05)
    assert loss == pytest.approx(wanted, rel=1e-5)
    for one, other in zip(seen, steps, strict=True):
        assert (one.name, one.step) == (other.name, other.step)
        assert one.loss == pytest.approx(other.loss, rel=1e-5)
        if other.validation is not None:
            assert one.validation == pytest.approx(other.validation, rel=1e-5)
            assert one.accuracy == pytest.approx(other.accuracy)


def test_what_reads_whole_matrices_is_refused_where_they_are_spread():
    with pytest.raises(TrainError, match="x: use_dora reads whole matrices, which fsdp spreads"):
        check_shardable({"x": dataclasses.replace(SETTINGS, dora=True)})
    with pytest.raises(TrainError, match="x: olora_init reads whole matrices"):
        check_shardable({"x": dataclasses.replace(SETTINGS, start="olora")})
    rounded = dataclasses.replace(tiny_base(), quantized="nf4")
    with pytest.raises(TrainError, match="fsdp spreads no nf4 matrices; drop quantization_bit"):
        shard(rounded)


@pytest.mark.slow
def test_two_processes_go_on_where_they_were_stopped(tmp_path):
    experts, _ = by_two(tmp_path / "whole")
    rounds = iter(range(1, 99))
    with pytest.raises(Stopped):
        by_two(tmp_path / "cut", stopped=lambda: next(rounds) == 3)
    again, rest = by_two(tmp_path / "cut")
    assert rest[0].step == 4
    assert [one.digest for one in again] == [one.digest for one in experts]


def test_a_process_that_is_killed_ends_the_run_which_can_go_on(tmp_path):
    lame = partial(assist, tmp_path, dies_at=4)
    with (
        pytest.raises(TrainError, match="was ended by signal 9; the run goes on from its newest"),
        together(2, lame) as processes,
    ):
        learned(Run(folder=tmp_path, save_every=1, processes=processes))
    assert [place.name[-1] for place in found(tmp_path)] == ["2", "3"]
    alike(learned(Run(folder=tmp_path))[0], learned(Run())[0])  # by one: as good a continuation


def fails(processes):
    raise TrainError("This process lacks the rows.")


def test_what_another_process_says_is_told():
    with (
        pytest.raises(TrainError, match=r"^This process lacks the rows\.$"),
        together(2, fails) as processes,
    ):
        processes.wait()


def test_each_row_is_one_processs():
    rows = list(range(7))
    parts = [Processes(n, 3).part(rows) for n in range(3)]
    assert sorted(row for part in parts for row in part) == rows
    assert Processes().part(rows) == rows


def test_what_a_launcher_was_told_and_is_not_done_is_refused(monkeypatch):
    meeting = dict.fromkeys(MEETING, "0")
    check_launcher(meeting | {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "true"})
    with pytest.raises(
        TrainError, match=r"mixed_precision: bf16 of .* is refused: the training file says it"
    ):
        check_launcher(meeting | {"ACCELERATE_MIXED_PRECISION": "bf16"})
    fsdp = meeting | {"ACCELERATE_USE_FSDP": "true", "FSDP_SHARDING_STRATEGY": "FULL_SHARD"}
    check_launcher(fsdp)
    with pytest.raises(TrainError, match="what is spread stays on its device"):
        check_launcher(fsdp | {"FSDP_OFFLOAD_PARAMS": "true"})
    with pytest.raises(TrainError, match=r"use_deepspeed: true of .* is refused: use FSDP"):
        check_launcher(meeting | {"ACCELERATE_USE_DEEPSPEED": "true"})
    with pytest.raises(TrainError, match="WORLD_SIZE is 2 but RANK, LOCAL_RANK, MASTER_ADDR"):
        check_launcher({"WORLD_SIZE": "2"})
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TrainError, match="leave `processes` out"), together(2, fails):
        pass
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(TrainError, match="processes is 0"), together(0, fails):
        pass
