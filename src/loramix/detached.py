"""Jobs in processes of their own, which outlive the terminal, and the truth about their state.

A job's process holds the lock of a file in the job's folder for as long as it lives: the kernel
lets go of it however the process ends, so a record that says "running" beside a free lock is of a
process that was killed, or of a machine that went down. (A number of a process would prove
nothing: it is given again. So nothing here sends a signal to one either: a job is stopped by a
file that its process looks for.) Who only looks shares the lock, and keeps nobody from looking.

    jobs/3f9c0a12/
      log     what the process prints
      lock
      stop    there once the process is to end
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import Any

from loramix.errors import Conflict, NoRecord, StoreError
from loramix.store import Store
from loramix.store.records import Job, State

LOG, LOCK, STOP = "log", "lock", "stop"
OPEN: tuple[State, ...] = ("queued", "running")
LOST = "Its process was killed, or the machine went down; `loramix jobs resume` goes on."
POLL_S = 0.1
PATIENCE_S = 2.0  # beyond the moment for which those who look hold a lock


def start(
    store: Store, kind: str, name: str, settings: Mapping[str, Any], root: Path, url: str
) -> Job:
    """A new job, its process begun, in a folder of its own under `root`."""
    folder = root.absolute() / secrets.token_hex(8)
    folder.mkdir(parents=True)
    with _locked(folder) as lock:
        try:
            told = {**settings, "folder": str(Path.cwd())}
            job = store.jobs.create(kind, name, told, str(folder))
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        _spawn(store, job, lock, url)
    return job


def resume(store: Store, job: Job, url: str) -> None:
    """Let a job that was stopped or failed go on. Conflict if it runs, or is done."""
    _require_over(seen(store, job), "there is nothing to resume")
    with _locked(_folder(job), patience_s=PATIENCE_S) as lock:
        job = store.jobs.get(job.id)  # another may have resumed or deleted it meanwhile
        if job.state == "done" or not store.jobs.requeue(job.id):
            raise Conflict(f"The job {job.id[:8]} is {job.state}; there is nothing to resume.")
        (_folder(job) / STOP).unlink(missing_ok=True)
        _spawn(store, job, lock, url, "--resume")


def ask_to_stop(store: Store, job: Job) -> Job:
    """Ask its process to end with its state kept, now or as soon as it can. Conflict if over."""
    job = seen(store, job)
    if job.state not in OPEN:
        raise Conflict(f"The job {job.id[:8]} is not running: it is {job.state}.")
    (_folder(job) / STOP).touch()
    return job


def stop(store: Store, job: Job) -> Job:
    """Ask its process to end with its state kept, and wait until it has. Conflict if over."""
    job = ask_to_stop(store, job)
    while job.state in OPEN:
        time.sleep(POLL_S)
        job = seen(store, store.jobs.get(job.id))
    return job


def delete(store: Store, job: Job) -> None:
    """Forget a job that is over, and its log. Conflict if it runs."""
    if not Path(job.folder).is_dir():  # of another machine, or removed by hand
        store.jobs.delete(job.id)
        return
    _require_over(seen(store, job), "stop it first")
    with _locked(_folder(job), patience_s=PATIENCE_S):
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
    """The job as it is: one whose process is gone is over, whatever its record says.

    A job whose folder is not on this machine is told as its record has it.
    """
    if job.state not in OPEN or not Path(job.folder).is_dir():
        return job
    try:
        with _locked(Path(job.folder), shared=True):  # nobody can begin it meanwhile
            is_asked = is_stopping(job)
            store.jobs.end(job.id, "stopped" if is_asked else "failed", "" if is_asked else LOST)
            return store.jobs.get(job.id)
    except Conflict:
        return job


def is_stopping(job: Job) -> bool:
    """Whether its process was asked to end and has not yet."""
    return job.state in OPEN and (Path(job.folder) / STOP).exists()


def heed(job: Job) -> None:
    """Have this process, which is the job's, get a SIGTERM once its stop is asked for."""
    asked = Path(job.folder) / STOP

    def watch() -> None:
        while not asked.exists():
            time.sleep(POLL_S)
        os.kill(os.getpid(), signal.SIGTERM)

    Thread(target=watch, daemon=True).start()


@contextmanager
def turn(job: Job) -> Iterator[None]:
    """Wait until no other job beside this one is at work: two would take each other's memory."""
    place = os.open(Path(job.folder).parent, os.O_RDONLY)
    try:
        fcntl.flock(place, fcntl.LOCK_EX)
        yield
    finally:
        os.close(place)


def _require_over(job: Job, otherwise: str) -> None:
    if job.state in OPEN:
        raise Conflict(f"The job {job.id[:8]} is {job.state}; {otherwise}.")


def _folder(job: Job) -> Path:
    folder = Path(job.folder)
    if not folder.is_dir():
        raise Conflict(
            f"The folder {folder} of the job {job.id[:8]} is not on this machine; ask where it ran."
        )
    return folder


def _spawn(store: Store, job: Job, lock: int, url: str, *words: str) -> None:
    """Begin its process, in a session of its own, the lock handed over without a gap.

    The thread takes note of its end, so that a long-lived parent keeps no zombie.
    """
    kept = {"LORAMIX_DATABASE": url, "LORAMIX_LIBRARY": job.settings["own_library"]}
    # -P: a file of the folder it begins in is not taken for one of Python's own modules
    command = [sys.executable, "-P", "-m", "loramix", "jobs", "run", job.id, *words]
    log = os.open(Path(job.folder) / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        process = subprocess.Popen(
            command,
            env={**os.environ, **kept},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=(lock,),
            start_new_session=True,
        )
    except OSError as error:
        said = f"Its process could not be begun: {error.strerror or error}."
        store.jobs.end(job.id, "failed", said)
        raise StoreError(f"The job {job.id[:8]} failed. {said}") from error
    finally:
        os.close(log)
    Thread(target=process.wait, daemon=True).start()


@contextmanager
def _locked(folder: Path, *, shared: bool = False, patience_s: float = 0) -> Iterator[int]:
    """The lock of a job, or Conflict. A process it is handed to keeps it when this one lets go."""
    try:
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    except FileNotFoundError:
        raise Conflict(f"The folder {folder} of a job is gone; somebody deleted it.") from None
    try:
        if not _taken(lock, fcntl.LOCK_SH if shared else fcntl.LOCK_EX, patience_s):
            raise Conflict(f"The job in {folder} is running; stop it first.")
        yield lock
    finally:
        os.close(lock)


def _taken(lock: int, how: int, patience_s: float) -> bool:
    end = time.monotonic() + patience_s
    while True:
        with suppress(BlockingIOError):
            fcntl.flock(lock, how | fcntl.LOCK_NB)
            return True
        if time.monotonic() >= end:
            return False
        time.sleep(POLL_S / 10)
