"""Opening a model for a command: one notice on stderr while it loads, nothing else."""

from __future__ import annotations

import gc
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from loramix import lm
from loramix.cli.flags import Machine, Where


def open_lm(where: Where, machine: Machine) -> lm.LM:
    """`loramix.open` with its warnings silenced and its progress on a terminal only."""
    hush(bars=sys.stderr.isatty() and where.base != "pocket")
    with notice(f"Opening {where.base} ..."), no_collection():
        return lm.open(
            where.base,
            where.shelf.folder,
            dtype=machine.dtype,
            device=machine.device,
            revision=machine.revision,
        )


@contextmanager
def notice(text: str) -> Iterator[None]:
    """Show a line on the terminal while something takes its time, then wipe it."""
    if not sys.stderr.isatty():
        yield
        return
    sys.stderr.write(text)
    sys.stderr.flush()
    try:
        yield
    finally:
        sys.stderr.write("\r\033[K")
        sys.stderr.flush()


@contextmanager
def no_collection() -> Iterator[None]:
    """Look for no garbage meanwhile, nor later among what is there then.

    Importing torch and transformers makes a million objects that all stay; searching them again
    and again takes half as long as the imports themselves.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def hush(*, bars: bool = False) -> None:
    """Keep the libraries' own chatter off the terminal; read by them when they are imported."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not bars:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
