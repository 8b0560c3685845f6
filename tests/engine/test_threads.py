"""A step has the cores to itself."""

import subprocess
import sys

import pytest
import torch

from loramix.engine.threads import _quota, sensible_threads


def test_a_containers_quota_is_known(tmp_path):
    assert _quota(tmp_path) is None
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert _quota(tmp_path) is None
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert _quota(tmp_path) == 2
    (tmp_path / "cpu.max").write_text("1000 100000\n")
    assert _quota(tmp_path) == 1
    (tmp_path / "cpu.max").unlink()
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("-1\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert _quota(tmp_path) is None
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("300000\n")
    assert _quota(tmp_path) == 3


def test_no_more_threads_than_torch_was_told():
    assert 1 <= sensible_threads() <= torch.get_num_threads()


TEAM = """
import os, torch
from loramix.engine.threads import rest
torch.set_num_threads(2)
count = lambda: len(os.listdir("/proc/self/task"))
rest()
alone = count()
numbers = torch.ones(1 << 20)
numbers + numbers
team = count()
rest()
assert (team - alone, count() - alone) == (1, 0), (alone, team, count())
assert float((numbers + numbers).sum()) == 2 << 20
"""


@pytest.mark.skipif(sys.platform != "linux", reason="GNU's OpenMP, and /proc to see it")
def test_a_resting_thread_has_no_team():
    subprocess.run([sys.executable, "-c", TEAM], check=True)
