"""How many CPU threads a step uses, and that nobody else's threads slow them down.

GNU's OpenMP keeps a team of threads for each thread that ever ran a parallel region, and as soon
as there are more threads in all teams than cores, no team spins any more between two regions: each
of a step's hundreds of products then waits for the kernel to wake a thread. A model that was opened
on one thread and computes on another has two teams. `rest` sends the caller's home: those who ask
the engine call it, and the engine itself while it has nothing to do.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from pathlib import Path

import torch
from threadpoolctl import threadpool_info  # type: ignore[import-untyped]

CGROUP = Path("/sys/fs/cgroup")
SOFT = 1  # omp_pause_soft: keep what is not about threads


def sensible_threads() -> int:
    """As many as torch would use, which is one a physical core, within the container's quota.

    (joblib knows the quota too, but importing it takes longer than opening a small model.)
    """
    quota = _quota(CGROUP)
    return torch.get_num_threads() if quota is None else min(torch.get_num_threads(), quota)


def _quota(cgroup: Path) -> int | None:
    """The cores that a Linux control group grants, version 2 or 1, rounded up; None if all."""
    for files in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):
        try:
            granted, period = " ".join((cgroup / file).read_text() for file in files).split()
        except (OSError, ValueError):
            continue
        if granted.isdecimal():  # otherwise "max" or -1
            return max(1, -(-int(granted) // int(period)))
    return None


def rest() -> None:
    """End the calling thread's team of OpenMP threads; it has a new one when it needs one."""
    for pause in _pauses(os.getpid()):
        pause(SOFT)


@functools.cache
def _pauses(process: int) -> list[Callable[[int], int]]:
    """`omp_pause_resource_all` (OpenMP 5.0) of each GNU OpenMP library in this process."""
    libraries = [
        ctypes.CDLL(library["filepath"])
        for library in threadpool_info()
        if library["prefix"] == "libgomp"
    ]
    return [
        library.omp_pause_resource_all
        for library in libraries
        if hasattr(library, "omp_pause_resource_all")
    ]
