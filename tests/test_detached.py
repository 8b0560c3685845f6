"""What a record of a job is worth: locks, several at once, and processes that never began."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

import loramix
from loramix import detached
from loramix.detached import _locked, ask_to_stop, delete, resume, seen, start, stop
from loramix.errors import Conflict, LoramixError, NoRecord, StoreError
from loramix.store import Store

SOURCE = Path(loramix.__file__).parents[1]


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(SOURCE))
    with Store.open(f"sqlite:///{tmp_path / 'jobs.db'}") as store:
        yield store


@pytest.fixture
def job(store, tmp_path):
    """A job whose process was killed in the middle of its work."""
    (tmp_path / "jobs" / "1").mkdir(parents=True)
    settings = {"own_library": str(tmp_path / "library"), "folder": str(tmp_path)}
    job = store.jobs.create("train", "x", settings, str(tmp_path / "jobs" / "1"))
    store.jobs.start(job.id, os.getpid())  # a number that another process has now
    return store.jobs.get(job.id)


@pytest.fixture
def begun(monkeypatch):
    """The processes that would have been begun."""
    jobs = []
    monkeypatch.setattr(
        detached, "_spawn", lambda store, job, lock, url, *words: jobs.append(words)
    )
    return jobs


def holder(folder):
    """Another process that has the lock, as a job's has, until its standard input ends."""
    code = (
        "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, 2); "
        "print(1, flush=True); sys.stdin.read()"
    )
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, "-c", code, folder / "lock"], stdin=pipe, stdout=pipe
    )
    process.stdout.readline()
    return process


def test_a_record_of_a_dead_process_says_so_and_nobody_is_signalled(store, job, begun):
    assert seen(store, job).state == "failed"  # and this process, of the recorded number, lives
    with pytest.raises(Conflict, match="it is failed"):
        stop(store, job)
    resume(store, job, "url")
    assert begun == [("--resume",)]


def test_one_whose_process_lives_is_as_its_record_says(store, job, begun):
    with holder(Path(job.folder)) as process:
        assert seen(store, job).state == "running"
        for refused in (lambda: resume(store, job, "url"), lambda: delete(store, job)):
            with pytest.raises(Conflict, match="is running"):
                refused()
        assert ask_to_stop(store, job).state == "running"
        assert detached.is_stopping(job)
        process.stdin.close()
        process.wait()
        process.stdout.close()
        process.stdin = None
    assert seen(store, job).state == "stopped"  # it was asked to, and is gone
    assert begun == []
    resume(store, job, "url")
    assert not detached.is_stopping(store.jobs.get(job.id))


def test_of_several_that_resume_at_once_one_does(store, job, begun):
    def attempt(_):
        try:
            resume(store, job, "url")
        except Conflict:
            return 0
        store.jobs.start(job.id, 1)  # as its process does
        return 1

    # The stand-in for the process holds no lock: the record alone must keep the others away.
    seen(store, job)
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(8) as pool:
        patch.setattr(detached, "seen", lambda store, job: store.jobs.get(job.id))
        done = list(pool.map(attempt, range(8)))
    assert sum(done) == len(begun) == 1


def test_looking_keeps_nobody_from_acting(store, job, begun):
    seen(store, job)
    ends = threading.Event()

    def look():
        while not ends.is_set():
            with suppress(Conflict), _locked(Path(job.folder), shared=True):
                pass

    looking = [threading.Thread(target=look) for _ in range(2)]
    for thread in looking:
        thread.start()
    try:
        resume(store, job, "url")
    finally:
        ends.set()
        for thread in looking:
            thread.join()
    assert len(begun) == 1


def test_a_process_that_cannot_be_begun_is_a_failed_job(store, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))
    with pytest.raises(StoreError, match="could not be begun"):
        start(store, "train", "x", {"own_library": ""}, tmp_path / "jobs", "url")
    (job,) = store.jobs.list()
    assert (job.state, "No such file" in job.error) == ("failed", True)


def test_a_record_that_cannot_be_written_leaves_no_folder(store, tmp_path):
    with pytest.raises(LoramixError):
        start(store, "train", "x", {"rate": float("nan")}, tmp_path / "jobs", "url")
    assert not any((tmp_path / "jobs").iterdir())


def test_a_job_of_another_machine_is_told_as_recorded(store, begun):
    job = store.jobs.create("train", "x", {}, "/nowhere/jobs/1")
    assert seen(store, job).state == "queued"
    with pytest.raises(Conflict, match="not on this machine"):
        stop(store, job)
    with pytest.raises(Conflict, match="queued"):
        resume(store, job, "url")
    delete(store, job)
    with pytest.raises(NoRecord):
        store.jobs.get(job.id)


def test_a_folder_of_python_files_is_not_imported_by_the_process(store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "typer.py").write_text("raise SystemExit(9)")
    settings = {"own_library": str(tmp_path), "words": ["none.yaml"], "data": None, "name": None,
                "base": "pocket", "library": None}  # fmt: skip
    job = start(store, "train", "x", settings, tmp_path / "jobs", f"sqlite:///{tmp_path}/jobs.db")
    while seen(store, store.jobs.get(job.id)).state in detached.OPEN:
        threading.Event().wait(0.05)
    assert "none.yaml does not exist" in store.jobs.get(job.id).error
