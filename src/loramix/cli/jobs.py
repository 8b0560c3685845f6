"""`loramix jobs`: trainings that run in processes of their own (`loramix train --detach`)."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from loramix.cli.flags import Json
from loramix.cli.printing import print_json, print_table
from loramix.errors import BadRequest, Conflict, LoramixError
from loramix.folders import own_database, own_library

if TYPE_CHECKING:
    from loramix.store import Store
    from loramix.store.records import Job
    from loramix.train.plans import Plan

jobs = typer.Typer(help="Follow, stop and resume detached trainings.")
Id = Annotated[str, Argument(help="The job's id, or how it begins.")]


def begin(name: str, settings: Mapping[str, Any]) -> None:
    """Start a training as a job, and print its id."""
    if os.name == "nt":
        raise BadRequest("--detach is not for Windows; leave it out.")
    from loramix.detached import start

    library = own_library().absolute()
    told = {**settings, "own_library": str(library)}
    with _store() as store:
        job = start(store, "train", name, told, library.parent / "jobs", own_database())
    typer.echo(job.id)
    typer.echo(f"Follow it: loramix jobs logs {job.id[:8]} --follow", err=True)


@jobs.command("list")
def list_(as_json: Json = False) -> None:
    """List the jobs, oldest first."""
    from loramix.detached import seen

    with _store() as store:
        found = [seen(store, job) for job in store.jobs.list()]
    if as_json:
        for job in found:
            print_json(asdict(job))
        return
    rows = [(job.id[:8], job.name, job.state, _when(job.created), _took(job)) for job in found]
    print_table(("job", "experts", "state", "made", "seconds"), rows)


@jobs.command()
def show(id: Id) -> None:
    """Show one job, as JSON."""
    from loramix.detached import named

    with _store() as store:
        print_json(asdict(named(store, id)))


@jobs.command()
def logs(
    id: Id,
    follow: Annotated[bool, Option("--follow", "-f", help="Until the job is over.")] = False,
) -> None:
    """Show what a job printed."""
    from loramix.detached import LOG, POLL_S, named

    with _store() as store:
        job = named(store, id)
        with (Path(job.folder) / LOG).open(encoding="utf-8", errors="replace") as log:
            while True:
                is_over = job.state not in ("queued", "running")
                typer.echo(log.read(), nl=False)
                if is_over or not follow:
                    return
                time.sleep(POLL_S)
                job = named(store, job.id)


@jobs.command()
def stop(id: Id) -> None:
    """Let a job end after its round, with a checkpoint; wait until it has."""
    from loramix.detached import named
    from loramix.detached import stop as stop_job

    with _store() as store:
        job = stop_job(store, named(store, id))
    typer.echo(f"{job.id[:8]} is {job.state}.", err=True)


@jobs.command()
def resume(id: Id) -> None:
    """Go on with a job that was stopped, failed or killed, from its newest checkpoint."""
    from loramix.detached import named
    from loramix.detached import resume as resume_job

    with _store() as store:
        resume_job(store, named(store, id), own_database())


@jobs.command()
def delete(id: Id) -> None:
    """Forget a job and its log; checkpoints and experts stay where they are."""
    from loramix.detached import delete as delete_job
    from loramix.detached import named

    with _store() as store:
        delete_job(store, named(store, id))


@jobs.command(hidden=True)
def run(id: str, resume: Annotated[bool, Option("--resume")] = False) -> None:
    """Be a job's process; how it ends is written to its record."""
    from loramix.detached import heed, turn

    with _store() as store:
        job = store.jobs.get(id)
        heed(job)
        with turn(job):
            if not store.jobs.start(id, os.getpid()):
                raise Conflict(f"The job {id[:8]} does not wait to run; use `loramix jobs resume`.")
            try:
                _train(job, resume=resume)
            except BaseException as error:
                _record(store, id, error)
                raise
            store.jobs.end(id, "done")


def _train(job: Job, *, resume: bool) -> None:
    from loramix.cli.train import work
    from loramix.train.feed import EVENTS, Feed

    os.chdir(job.settings["folder"])
    work(_plan(job), resume=resume, feed=Feed(Path(job.folder) / EVENTS))


def _plan(job: Job) -> Plan:
    """What a job is to train: a server's keys of a training file, or a command line's words."""
    from loramix.cli.train import planned
    from loramix.train.recipe import plan

    settings = job.settings
    if "config" in settings:
        return plan({**settings["config"], "output_dir": str(Path(job.folder) / "training")})
    data, library = (settings[key] and Path(settings[key]) for key in ("data", "library"))
    return planned(settings["words"], data, settings["name"], settings["base"], library)


def _record(store: Store, id: str, error: BaseException) -> None:
    loop = sys.modules.get("loramix.train.loop")  # not loaded: nothing was trained yet
    if loop is not None and isinstance(error, loop.Stopped):
        store.jobs.end(id, "stopped")
    elif isinstance(error, LoramixError):
        store.jobs.end(id, "failed", str(error))
    else:
        store.jobs.end(id, "failed", f"{type(error).__name__}: {error}"[:1000])


def _store() -> Store:
    from loramix.store import Store

    return Store.open(own_database())


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _took(job: Job) -> str:
    if job.started is None:
        return "-"
    return f"{(job.ended or time.time()) - job.started:.0f}"
