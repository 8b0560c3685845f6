"""The router of a running server: taken up when it was replaced, refitted when adapters joined.

A refit takes seconds to minutes of a core. So it is a process of its own, which gives way to the
engine and replaces the router on the disk when it is done; ending it costs nothing but its work.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from contextlib import suppress

from loramix.errors import LoramixError
from loramix.lm import ROUTER
from loramix.route.feedback import CorrectedRouter
from loramix.serve.service import Service

WATCH_S = 1.0
POLITE = 10  # niceness

log = logging.getLogger("loramix.serve")


async def keep_learned(service: Service) -> None:
    """While the server runs: route by what is on the disk, whoever put it there.

    A refit that failed is tried again when the router has changed.
    """
    failed: tuple[int, int] | None = None
    while not service.live.is_ending:
        try:
            await asyncio.to_thread(service.reload_router)
        except LoramixError as error:  # somebody broke it: the one in memory goes on
            log.warning("The router cannot be taken up: %s", error)
        if _is_fresh(service) and service.live.router != failed:
            before = service.live.router
            failed = None if await _refitted(service) else before
        await asyncio.sleep(WATCH_S)


def _is_fresh(service: Service) -> bool:
    """Whether adapters joined the router on the disk that were not learned with the others."""
    router = service.lm.router
    return isinstance(router, CorrectedRouter) and bool(router.gate.fresh)


async def _refitted(service: Service) -> bool:
    """Refit the router on the disk in another process; false if that failed."""
    library = service.lm.library.folder
    words = ("-m", "loramix", "route", "refit", "--library", str(library))
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *words,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    if os.name == "posix":
        with suppress(ProcessLookupError):
            os.setpriority(os.PRIO_PROCESS, process.pid, POLITE)
    ending = asyncio.create_task(_end_with(service, process))
    _, said = await process.communicate()
    ending.cancel()
    if process.returncode and not service.live.is_ending:
        log.warning("The router of %s was not refitted: %s", library / ROUTER, said.decode()[:500])
    return process.returncode == 0


async def _end_with(service: Service, process: asyncio.subprocess.Process) -> None:
    while not service.live.is_ending:
        await asyncio.sleep(WATCH_S / 4)
    with suppress(ProcessLookupError):
        process.terminate()
