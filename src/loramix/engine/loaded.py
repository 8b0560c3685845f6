"""The adapters that requests need: in memory or read from the library, held while they run."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from functools import partial

from loramix.adapter import Adapter
from loramix.base import Base
from loramix.engine.core import Core
from loramix.engine.residents import Resident, Residents
from loramix.errors import Busy, EngineError, UnknownAdapter
from loramix.library import Library, check_fingerprint
from loramix.lora import size_bytes
from loramix.mix import Mix
from loramix.threads import aside


class LoadedAdapters:
    """Those in memory, within a budget of bytes, and the library that others are read from.

    Any thread may call. A name means the content that was added last; who holds an adapter keeps
    the content it began with.
    """

    def __init__(self, base: Base, library: Library | None, core: Core, limit_bytes: int) -> None:
        self._base = base
        self._library = library
        self._core = core
        self._residents = Residents(limit_bytes)
        self._lock = threading.Lock()  # of the residents; nobody who has it waits for the core
        self._released = threading.Condition(self._lock)  # some request let its adapters go
        self._adding = threading.Lock()  # one adapter after another

    @property
    def names(self) -> tuple[str, ...]:
        """Of those in memory, sorted."""
        with self._lock:
            return tuple(self._residents.names)

    def add(self, adapter: Adapter, *, aligned: bool) -> None:
        """Add or replace one, to stay; in the base's precision, if `aligned`, or its own.

        Raises BaseMismatch, AdapterError for one larger than all may be together, Busy if those at
        work leave no room.
        """
        with self._adding:
            self._add(adapter, aligned=aligned, pinned=True).result()

    def remove(self, name: str) -> None:
        """Forget one; requests that hold it finish. Raises UnknownAdapter."""
        with self._lock:
            if name not in self._residents:
                raise UnknownAdapter(name, self._residents.names)
            self._unbind(self._residents.remove(name))

    def require_known(self, names: Iterable[str]) -> None:
        """Raises UnknownAdapter for one that is neither in memory nor in the library."""
        here = self.names
        for name in dict.fromkeys(names):
            if name not in here:
                self._require_library(name)

    def hold(self, mix: Mix, *, wait: bool) -> list[Resident]:
        """The adapters of a mix, which stay in memory until they are released.

        Without room for them while others are at work: Busy, or `wait`. What was held by then is
        let go meanwhile, so two who wait do not wait for each other.
        """
        while True:
            held: list[Resident] = []
            try:
                for name in mix:
                    held.append(self._held(name, beside=held))
                return held
            except Busy:
                if not wait:
                    raise
            finally:
                if len(held) < len(mix):
                    self.release(held)
            with self._released:
                self._released.wait(timeout=1)

    def release(self, held: Sequence[Resident]) -> None:
        with self._released:
            for resident in held:
                self._unbind(self._residents.release(resident))
            self._released.notify_all()

    async def read(self, mix: Mix) -> None:
        """Read the adapters of a mix that are not there yet, without holding up the event loop."""
        self.require_known(mix)
        if not set(mix) <= set(self.names):
            # Released there too: who stops waiting for it must not leave it held.
            await asyncio.to_thread(lambda: self.release(self.hold(mix, wait=False)))

    def _add(
        self, adapter: Adapter, *, aligned: bool, pinned: bool, beside_bytes: int = 0
    ) -> Future[None]:
        """Done when the model has it; tasks that are submitted after this may name it before."""
        check_fingerprint(adapter, self._base)
        dtype = self._base.dtype if aligned else None
        bound = f"{adapter.name}@{adapter.digest}{'' if aligned else '@own'}"
        resident = Resident(bound, size_bytes(adapter.pairs.values(), dtype), pinned)
        with self._lock:
            residents, needed = self._residents, resident.size_bytes
            self._unbind(residents.make_room(adapter.name, needed, beside_bytes))
        done = self._core.bind(adapter, bound, dtype)
        with self._lock:
            self._unbind(self._residents.put(adapter.name, resident))
        return done

    def _unbind(self, gone: Iterable[Resident]) -> None:
        with contextlib.suppress(EngineError):  # closed: nothing is bound any more
            for resident in gone:
                self._core.unbind(resident.bound)

    def _held(self, name: str, beside: Sequence[Resident]) -> Resident:
        """One adapter, in memory and held; it is read from the library if it has to be."""
        beside_bytes = sum(resident.size_bytes for resident in beside if not resident.pinned)
        while True:
            with self._lock:
                if name in self._residents:
                    return self._residents.hold(name)
            with self._adding:
                if name not in self.names:
                    adapter = aside(partial(self._require_library(name).load, name))
                    self._add(adapter, aligned=True, pinned=False, beside_bytes=beside_bytes)

    def _require_library(self, name: str) -> Library:
        """The library, which holds this adapter. Raises UnknownAdapter."""
        known = self._library.names() if self._library else ()
        if self._library is None or name not in known:
            raise UnknownAdapter(name, {*known, *self.names})
        return self._library
