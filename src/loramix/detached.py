"""Jobs in processes of their own, which outlive the terminal, and the truth about their state.

A job's process holds the lock of a file in the job's folder for as long as it lives: the kernel
lets go of it however the process ends, so a record that says "running" beside a free lock is of a
process that was killed, or of a machine that went down. (A number of a process would prove
nothing: it is given again.)

    jobs/3f9c0a12/
      log     what the process prints
      lock
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loramix.errors import Conflict, NoRecord
from loramix.store import Store
from loramix.store.records import Job

LOG, LOCK = "log", "lock"
LOST = "Its process was killed, or the machine went down; `loramix jobs resume` goes on."
POLL_S = 0.1


def start(
    store: Store, kind: str, name: str, settings: Mapping[str, Any], root: Path, url: str
) -> Job:
    """A new job, its process begun, in a folder of its own under `root`."""
    folder = root.absolute() / secrets.token_hex(4)
    folder.mkdir(parents=True)
    with _locked(folder) as lock:
        told = {**settings, "folder": str(Path.cwd())}
        job = store.jobs.create(kind, name, told, str(folder))
        _spawn(job, lock, url)
    return job


def resume(store: Store, job: Job, url: str) -> None:
    """Let a job that was stopped or failed go on. Conflict if it runs, or is done."""
    with _locked(Path(job.folder)) as lock:
        job = _settled(store, job)
        if job.state == "done" or not store.jobs.requeue(job.id):
            raise Conflict(f"The job {job.id[:8]} is {job.state}; there is nothing to resume.")
        _spawn(job, lock, url, "--resume")


def stop(store: Store, job: Job) -> Job:
    """Ask its process to end with its state kept, and wait for that. Conflict if it is over."""
    job = seen(store, job)
    asked = False
    while (job := store.jobs.get(job.id)).state in ("queued", "running") and _is_held(job):
        if job.pid is not None and not asked:
            os.kill(job.pid, signal.SIGTERM)
            asked = True
        time.sleep(POLL_S)
    if asked:  # its process may have ended before it could say so: while the base was opened
        store.jobs.end(job.id, "stopped")
        return store.jobs.get(job.id)
    raise Conflict(f"The job {job.id[:8]} is not running: it is {seen(store, job).state}.")


def delete(store: Store, job: Job) -> None:
    """Forget a job that is over, and its log. Conflict if it runs."""
    with _locked(Path(job.folder)):
        store.jobs.delete(job.id)
        shutil.rmtree(job.folder, ignore_errors=True)


def named(store: Store, id: str) -> Job:
    """The job whose id begins so. NoRecord if it is none or several."""
    matching = [job for job in store.jobs.list() if id and job.id.startswith(id)]
    if len(matching) != 1:
        known = "several jobs" if matching else "no job"
        raise NoRecord(f"There are {known} of id {id[:80]!r}; `loramix jobs list` names them.")
    return seen(store, matching[0])


def seen(store: Store, job: Job) -> Job:
    """The job as it is: one whose process is gone has failed, whatever its record says."""
    if job.state not in ("queued", "running") or not Path(job.folder).is_dir():
        return job
    try:
        with _locked(Path(job.folder)):
            return _settled(store, job)
    except Conflict:
        return job


def _settled(store: Store, job: Job) -> Job:
    """The job as it is, told by one who holds its lock, so that nobody else can begin it now."""
    store.jobs.end(job.id, "failed", LOST)
    return store.jobs.get(job.id)


def _spawn(job: Job, lock: int, url: str, *words: str) -> None:
    """Begin its process, in a session of its own, the lock handed over without a gap."""
    kept = {"LORAMIX_DATABASE": url, "LORAMIX_LIBRARY": job.settings["own_library"]}
    os.set_inheritable(lock, True)
    log = str(Path(job.folder) / LOG)
    os.posix_spawn(
        sys.executable,
        [sys.executable, "-m", "loramix", "jobs", "run", job.id, *words],
        {**os.environ, **kept},
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
        setsid=True,
    )


def _is_held(job: Job) -> bool:
    try:
        with _locked(Path(job.folder)):
            return False
    except Conflict:
        return True


@contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """The lock of a job, or Conflict. A process it is handed to keeps it when this one lets go."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield lock
    except BlockingIOError:
        raise Conflict(f"The job in {folder} is running; stop it first.") from None
    finally:
        os.close(lock)
