"""Opening a model for a command: one notice on stderr while it loads, nothing else."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

from loramix import lm
from loramix.cli.flags import Machine, Where

if TYPE_CHECKING:
    from loramix.base import Base


def open_lm(where: Where, machine: Machine) -> lm.LM:
    """`loramix.open` with its warnings silenced and its progress on a terminal only."""
    hush(bars=sys.stderr.isatty() and where.base != "pocket")
    with notice(f"Opening {where.base} ..."), no_collection():
        import_quickly()
        return lm.open(where.base, where.shelf.folder, **asdict(machine))


def open_base(where: Where, machine: Machine) -> Base:
    """The base alone, opened as quietly as `open_lm` opens it with all that belongs to it."""
    hush(bars=sys.stderr.isatty() and where.base != "pocket")
    with notice(f"Opening {where.base} ..."), no_collection():
        import_quickly()
        from loramix import base

        return base.open_base(where.base, **asdict(machine))


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


def import_quickly() -> None:
    """Import transformers with half a second less of what a language model does not need.

    The linker takes 0.2 s over torch's library; it needs no Python, so it works beside the imports
    that need no torch. transformers reads its 1,900 files twice (0.3 s) to list their classes: once
    by its folder of models, once by a file in it. And it imports scipy's optimisers (0.3 s) for the
    losses of object detection wherever scipy is installed. This is for a command, which ends with
    its answer: a library must not change what others find installed.
    """
    Thread(target=link_torch).start()
    utils, listing = (import_module(f"transformers.{n}") for n in ("utils", "utils.import_utils"))
    by_folder: Any = getattr(listing, "define_import_structure", None)
    with replaced(listing, "define_import_structure", lambda file: by_folder(Path(file).parent)):
        import_module("transformers.models")
    with replaced(utils, "is_scipy_available", lambda: False):
        import_module("transformers.loss.loss_utils")


@contextmanager
def replaced(module: Any, name: str, value: object) -> Iterator[None]:
    """A name of a module means something else meanwhile; nothing if it has no such name."""
    before = getattr(module, name, None)
    if before is None:
        yield
        return
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def link_torch() -> None:
    """Load torch's largest library; a build that cannot be loaded this way is left to torch."""
    torch = find_spec("torch")
    for folder in (torch and torch.submodule_search_locations) or ():
        for library in Path(folder, "lib").glob("libtorch_cpu.*"):
            with suppress(OSError):
                ctypes.CDLL(str(library))


def hush(*, bars: bool = False) -> None:
    """Keep the libraries' own chatter off the terminal; read by them when they are imported."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not bars:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
