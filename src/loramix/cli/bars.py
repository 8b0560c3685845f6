"""How far a training is, on a terminal or in a log."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from loramix.train.loop import Progress


@contextmanager
def bars() -> Iterator[Any]:
    """A bar an expert on a terminal; a line a validation elsewhere."""
    if not sys.stderr.isatty():
        yield _line
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    from loramix.train.memory import used_bytes

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[told]}"),
    )
    tasks: dict[str, Any] = {}
    with Bars(*columns, console=Console(stderr=True)) as shown:

        def report(progress: Progress) -> None:
            known = tasks.get(progress.name)
            if known is None:
                known = tasks[progress.name] = shown.add_task(progress.name, total=1, told="")
            told = (
                f"loss {progress.loss:.3f}, {progress.tokens_per_s:,.0f} tokens/s, "
                f"{used_bytes() / 2**20:,.0f} MiB"
            )
            shown.update(known, completed=progress.step, total=progress.num_steps, told=told)

        yield report


def _line(progress: Progress) -> None:
    if progress.validation is not None or progress.step == progress.num_steps:
        held = ""
        if progress.validation is not None and progress.accuracy is not None:
            held = f", validation {progress.validation:.4f} ({progress.accuracy:.1%} of tokens)"
        typer.echo(
            f"{progress.name} {progress.step}/{progress.num_steps}: loss {progress.loss:.4f}{held},"
            f" {progress.tokens_per_s:,.0f} tokens/s",
            err=True,
        )
