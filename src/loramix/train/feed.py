"""What a run tells those who follow it from outside: a file of events that only grows.

    {"event": "progress", "at": 1763856000.1, "expert": "sql", "step": 3, "loss": 2.1, ...}

`trainer_log.jsonl` is cut back when a run is taken up again; this file never is, so a place in it,
in bytes, names an event for good. A reader that lost its connection says how far it came.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loramix.errors import BadRequest

if TYPE_CHECKING:
    from loramix.train.loop import Progress

EVENTS = "events.jsonl"
EVERY_S = 0.5  # between two events of one expert; validations and last steps are always told
CHUNK = 1 << 16  # bytes of events read at once

Event = tuple[int, dict[str, Any]]  # the place behind it, and what it says


class Feed:
    """Appends events to a file, a line each, in one write."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._began: dict[str, tuple[float, int]] = {}  # of each expert in this process
        self._told: dict[str, float] = {}
        _mend(file)

    def tell(self, event: str, **facts: Any) -> None:
        line = json.dumps({"event": event, "at": round(time.time(), 3), **facts})
        with self._file.open("a", encoding="utf-8") as out:
            out.write(line + "\n")

    def progress(self, at: Progress) -> None:
        from loramix.train.memory import used_bytes

        now = time.monotonic()
        began, first = self._began.setdefault(at.name, (now, at.step))
        matters = at.validation is not None or at.step == at.num_steps
        if not matters and now - self._told.get(at.name, -math.inf) < EVERY_S:
            return
        self._told[at.name] = now
        self.tell(
            "progress",
            expert=at.name,
            step=at.step,
            num_steps=at.num_steps,
            loss=at.loss,
            validation=_finite(at.validation),
            accuracy=at.accuracy,
            rate=at.rate,
            norm=_finite(at.norm),
            epoch=round(at.epoch, 4),
            tokens_per_s=round(at.tokens_per_s, 1),
            remaining_s=_remaining_s(now - began, at.step - first, at.num_steps - at.step),
            memory_bytes=used_bytes(),
        )


def read_events(file: Path, place: int = 0) -> Iterator[Event]:
    """The events behind a place, as far as there are any. BadRequest if no event ends there."""
    if not file.exists() and place == 0:
        return
    try:
        with file.open("rb") as events:
            events.seek(max(0, place - 1))
            if place and events.read(1) != b"\n":
                raise BadRequest(f"No event of this job ends at {place}; leave Last-Event-ID out.")
            for line in events.readlines(CHUNK):
                if not line.endswith(b"\n"):  # being written
                    return
                place += len(line)
                yield place, json.loads(line)
    except FileNotFoundError:
        raise BadRequest(f"No event of this job ends at {place}; it has none.") from None


def _remaining_s(elapsed_s: float, done: int, left: int) -> float | None:
    """None while nothing was measured yet: the step that was told first had begun before."""
    if not left:
        return 0.0
    return round(elapsed_s / done * left, 1) if done else None


def _finite(number: float | None) -> float | None:
    """JSON has no other numbers."""
    return number if number is not None and math.isfinite(number) else None


def _mend(file: Path) -> None:
    """End a line that a killed process left unfinished: what it said was never promised."""
    if file.exists() and (text := file.read_bytes()) and not text.endswith(b"\n"):
        with file.open("r+b") as events:
            events.truncate(text.rfind(b"\n") + 1)
