"""A merge into a base, ended at any moment: nothing looks whole, and the next takes it up."""

from __future__ import annotations

import multiprocessing
import random
import shutil
import signal
import time

import pytest
import torch

from loramix.errors import MergeError
from loramix.folders import POCKET_BASE, POCKET_LIBRARY
from loramix.formats import peft
from loramix.merge import journal
from loramix.merge.journal import part_of
from loramix.merge.stream import merge_into
from tests.merge.bases import bytes_of, recipe


class Stop(Exception):
    """Stands for whatever ends a process."""


def stopped_after(count, monkeypatch):
    """Merges die when they have written so many tensors."""
    record = journal.Staging.record
    written = []

    def counting(self, name, sha256):
        record(self, name, sha256)
        written.append(name)
        if len(written) == count:
            raise Stop

    monkeypatch.setattr(journal.Staging, "record", counting)


def test_a_merge_that_died_is_taken_up_where_it_was(llama, tmp_path, monkeypatch):
    _, folder, adapters = llama
    merge_into(folder, adapters, recipe(), tmp_path / "whole")
    with monkeypatch.context() as patch:
        stopped_after(5, patch)
        with pytest.raises(Stop):
            merge_into(folder, adapters, recipe(), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (part_of(tmp_path / "out") / "config.json").exists()
    (part_of(tmp_path / "out") / ".card.json.0123").write_text("half")  # as a kill may leave it
    assert merge_into(folder, adapters, recipe(), tmp_path / "out").num_resumed >= 5
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


def test_what_an_earlier_run_left_is_trusted_only_if_it_is_the_same(llama, tmp_path, monkeypatch):
    _, folder, adapters = llama
    merge_into(folder, adapters, recipe(), tmp_path / "whole")
    for damage in ("bytes", "recipe", "tail", "journal"):
        earlier = recipe("a") if damage == "recipe" else recipe()
        with monkeypatch.context() as patch:
            stopped_after(5, patch)
            with pytest.raises(Stop):
                merge_into(folder, adapters, earlier, tmp_path / "out")
        part = part_of(tmp_path / "out")
        if damage == "bytes":
            for file in part.glob("*.safetensors"):
                file.write_bytes(bytes(file.stat().st_size))
        elif damage == "tail":
            with (part / journal.JOURNAL).open("a") as file:
                file.write('{"tensor": "model.l')
        elif damage == "journal":
            (part / journal.JOURNAL).write_bytes(bytes(99) + b"\n")
        did = merge_into(folder, adapters, recipe(), tmp_path / "out")
        assert (did.num_resumed >= 5) == (damage == "tail")
        assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")
        shutil.rmtree(tmp_path / "out")


def test_two_merges_do_not_write_one_folder(llama, tmp_path):
    _, folder, adapters = llama
    with (
        journal.staging(tmp_path / "out", "other"),
        pytest.raises(MergeError, match="another process"),
    ):
        merge_into(folder, adapters, recipe(), tmp_path / "out")


def merge_pocket(out):
    torch.set_num_threads(1)
    adapters = {name: peft.read(POCKET_LIBRARY / name) for name in ("sql", "support")}
    merge_into(POCKET_BASE, adapters, recipe("sql:0.5+support:0.5"), out)


@pytest.mark.skipif(not POCKET_LIBRARY.exists(), reason="pocket is not built")
def test_killed_at_any_moment_it_leaves_nothing_that_looks_whole(tmp_path):
    """SIGKILL at 20 random moments, each run taking up the one before; then the same bytes."""
    start = time.perf_counter()
    merge_pocket(tmp_path / "whole")
    took = time.perf_counter() - start
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([__name__])
    moment, killed = random.Random(0), 0
    while killed < 20:
        run = server.Process(target=merge_pocket, args=(tmp_path / "out",))
        run.start()
        run.join(moment.uniform(0, took))
        run.kill()  # which may come too late
        run.join()
        killed += run.exitcode == -signal.SIGKILL
        if (tmp_path / "out").exists():
            assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")
            shutil.rmtree(tmp_path / "out")
    merge_pocket(tmp_path / "out")
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")
