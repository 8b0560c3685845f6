"""Which adapters are in memory, within a budget of bytes: idle ones leave, longest unused first.

The budget counts each adapter once; layers keep side-by-side copies of recent sets besides.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from loramix.errors import AdapterError, Busy


@dataclass(slots=True, eq=False)
class Resident:
    """One adapter in memory."""

    bound: str  # its name in the model, which says its content too
    size_bytes: int
    pinned: bool = False  # stays until it is removed or replaced
    num_users: int = 0  # requests that hold it


class Residents:
    """The adapters that a name means now, and those that requests still hold.

    What a method returns has left: nobody holds it and no name means it. Not thread-safe.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._entries: OrderedDict[str, Resident] = OrderedDict()  # used longest ago first
        self._leaving: list[Resident] = []

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    @property
    def names(self) -> list[str]:
        return sorted(self._entries)

    @property
    def size_bytes(self) -> int:
        return sum(resident.size_bytes for resident in self._all())

    def hold(self, name: str) -> Resident:
        """Use an adapter: it does not leave before `release`."""
        resident = self._entries[name]
        self._entries.move_to_end(name)
        resident.num_users += 1
        return resident

    def release(self, resident: Resident) -> list[Resident]:
        resident.num_users -= 1
        if resident.num_users or resident not in self._leaving:
            return []
        self._leaving.remove(resident)
        return [resident]

    def make_room(self, name: str, size_bytes: int, beside_bytes: int = 0) -> list[Resident]:
        """Take idle adapters out until one of this size, to be called `name`, fits.

        `beside_bytes` are held by whoever asks. Raises AdapterError if it cannot fit beside those
        and the pinned ones, Busy if others are held; nothing leaves then.
        """
        pinned = sum(r.size_bytes for n, r in self._entries.items() if r.pinned and n != name)
        if size_bytes + beside_bytes + pinned > self.limit_bytes:
            raise AdapterError(
                f"{name!r} takes {size_bytes:,} bytes, beside {beside_bytes:,} of the same mix and "
                f"{pinned:,} that stay, but all adapters together may take {self.limit_bytes:,}; "
                f"open the engine with more adapter_bytes."
            )
        replaced = self._entries.get(name)
        room = self.limit_bytes - self.size_bytes
        if replaced and not replaced.num_users:
            room += replaced.size_bytes
        idle = [
            other
            for other, resident in self._entries.items()
            if not (resident.pinned or resident.num_users or other == name)
        ]
        going: list[str] = []
        while room < size_bytes:
            if len(going) == len(idle):
                raise Busy(f"No room for {name!r}: the adapters in memory are all at work.")
            going.append(idle[len(going)])
            room += self._entries[going[-1]].size_bytes
        return [self._entries.pop(other) for other in going]

    def put(self, name: str, resident: Resident) -> list[Resident]:
        """Have a name mean this adapter."""
        replaced = self.remove(name) if name in self._entries else []
        self._entries[name] = resident
        return replaced

    def remove(self, name: str) -> list[Resident]:
        resident = self._entries.pop(name)
        if not resident.num_users:
            return [resident]
        self._leaving.append(resident)
        return []

    def _all(self) -> list[Resident]:
        return [*self._entries.values(), *self._leaving]
