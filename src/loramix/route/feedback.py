"""Corrections: what a router got wrong, said by a person, kept in a log beside it.

A correction acts at once as an exemplar: it decides for every query that is closer to it than to
any stored example of another adapter, and close enough. At the next refit it also teaches the gate,
if that costs nothing on held-out rows. Nobody but a person adds one: a router that learned from its
own choices would confirm its errors.

The log has one JSON object a line and only grows; taking a correction back is a line as well:

    {"id": "5f3a...", "text": "...", "right": "sql", "at": "..."}     null: the base is right
    {"undo": "5f3a...", "at": "..."}
    {"joined": ["5f3a..."], "at": "..."}                              the gate has learned these

A line counts once it ends in a line break; it is on disk (fsync) before `correct` returns. What a
crash left of a line was never promised: the next line begins after it, and readers pass over it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from loramix.chat import Message
from loramix.errors import RouteError, UnknownAdapter
from loramix.mix import Mix
from loramix.route import Decision
from loramix.route.blend import place
from loramix.route.gate import GateRouter
from loramix.route.neighbours import Neighbours
from loramix.route.ngrams import words
from loramix.route.rows import Batch, read
from loramix.route.turns import follow, user_turns

NEAR = {False: 0.6, True: 0.8}  # least cosine of a correction that acts: n-grams, sentence vectors
TIE = 1e-4  # a stored example as near as a correction, perhaps the same text, gives way to it


@dataclass(frozen=True, slots=True)
class Correction:
    id: str
    text: str
    right: str | None  # the adapter; None is the base
    joined: bool = False  # the gate has learned it


class FeedbackLog:
    """The file of corrections beside a router's folder; the router is replaced, the log stays."""

    def __init__(self, router: Path, *, packaged: bool = False) -> None:
        self.packaged = packaged  # of a library that stays as it was installed
        self.path = router.with_name(router.name + ".feedback.jsonl")

    def corrections(self) -> tuple[Correction, ...]:
        """Those that were not taken back, oldest first. Raises RouteError."""
        found: dict[str, Correction] = {}
        for line in self._lines():
            if "undo" in line:
                found.pop(line["undo"], None)
            for id in line.get("joined", ()):
                if id in found:
                    found[id] = Correction(id, found[id].text, found[id].right, joined=True)
            if "id" in line:
                found[line["id"]] = Correction(line["id"], line["text"], line["right"])
        return tuple(found.values())

    def learned(self) -> tuple[Correction, ...]:
        """All that a refit ever taught the gate, also those that were taken back since."""
        lines = list(self._lines())
        joined = {id for line in lines for id in line.get("joined", ())}
        known = [line for line in lines if line.get("id") in joined]
        return tuple(Correction(line["id"], line["text"], line["right"], True) for line in known)

    def correct(self, text: str, right: str | None) -> Correction:
        """Raises RouteError for a text without words, and if the file cannot be written."""
        if not words(text):
            raise RouteError("The text has no words to route on; expected a query.")
        made = Correction(uuid4().hex[:12], text, right)
        self._append({"id": made.id, "text": text, "right": right})
        return made

    def undo(self, id: str) -> Correction:
        """Take a correction back. RouteError if there is none of this id."""
        for each in self.corrections():
            if each.id == id:
                self._append({"undo": id})
                return each
        raise RouteError(f"No correction {id[:40]!r} to undo; `loramix route feedback` lists them.")

    def check(self) -> None:
        """Raise RouteError where a router must stay as it is."""
        if self.packaged:
            raise RouteError(
                f"The library in {self.path.parent} is part of the package and stays as it is; "
                f"name another with --library, or correct a running server with --server."
            )

    def join(self, ids: Sequence[str]) -> None:
        self._append({"joined": list(ids)})

    @property
    def state(self) -> tuple[int, int]:
        """Changes whenever the file does: when it was written, and its size."""
        try:
            found = self.path.stat()
        except FileNotFoundError:
            return 0, 0
        except OSError as error:
            raise self._failed(error) from error
        return found.st_mtime_ns, found.st_size

    def _lines(self) -> Iterator[Mapping[str, Any]]:
        try:
            raw = self.path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            raise self._failed(error) from error
        for line in raw.split(b"\n")[:-1]:
            try:
                found = json.loads(line)
            except ValueError:  # torn by a crash
                continue
            if isinstance(found, dict):
                yield found

    def _append(self, line: Mapping[str, Any]) -> None:
        """One write of one line at the end, so that writers do not interleave."""
        self.check()
        facts = {**line, "at": datetime.now(UTC).isoformat(timespec="seconds")}
        raw = json.dumps(facts).encode() + b"\n"
        try:
            with self.path.open("a+b", buffering=0) as file:
                if end := file.seek(0, os.SEEK_END):
                    file.seek(end - 1)
                    raw = raw if file.read(1) == b"\n" else b"\n" + raw
                if file.write(raw) != len(raw):
                    raise OSError("the disk took half a line")
                os.fsync(file.fileno())
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> RouteError:
        reason = error.strerror or str(error)
        return RouteError(f"Cannot use the corrections in {self.path}: {reason}; check its folder.")


class CorrectedRouter:
    """A router with the corrections beside it; a line added by any process acts on the next query.

    What was corrected follows no earlier turn, and later ones may follow it.
    """

    def __init__(self, gate: GateRouter, log: FeedbackLog) -> None:
        self.gate = gate
        self.log = log
        self._read = _Exemplars.of(gate, log)

    @property
    def adapters(self) -> tuple[str, ...]:
        return self.gate.adapters

    def scores(self, queries: Sequence[str]) -> list[list[float]]:
        """The gate's; corrections decide, they do not score."""
        return self.gate.scores(queries)

    def route(self, messages: Sequence[Message]) -> Decision:
        """As the gate, unless a correction is near. Raises RouteError."""
        started = time.perf_counter()
        decision = follow(self.decide, self.gate.information, user_turns(messages))
        return replace(decision, latency_ms=(time.perf_counter() - started) * 1e3)

    def decide(self, query: str) -> Decision:
        """The decision on one text, whatever came before it."""
        exemplars = self._read
        if exemplars.state != self.log.state:
            self._read = exemplars = _Exemplars.of(self.gate, self.log)
        if not words(query):
            return self.gate.decide(query)
        batch, tokens = self.gate.read(query)
        return exemplars.correct(self.gate, query, batch, self.gate.decided(query, batch, tokens))

    def correct(self, text: str, right: str | None) -> Correction:
        """Keep a correction; it acts from now on. Raises UnknownAdapter, RouteError."""
        if right is not None and right not in self.adapters:
            raise UnknownAdapter(right, self.adapters)
        return self.log.correct(text, right)


@dataclass(frozen=True, slots=True, eq=False)
class _Exemplars:
    """Corrections where a router sees them, and the state of the log they were read in."""

    state: tuple[int, int]
    known: tuple[Correction, ...]
    spoken: tuple[list[str], ...]  # the words of each
    places: Neighbours

    @classmethod
    def of(cls, gate: GateRouter, log: FeedbackLog) -> _Exemplars:
        state, found = log.state, log.corrections()
        known = tuple(c for c in found if c.right is None or c.right in gate.adapters)
        texts = tuple(c.text for c in known)
        rows = place(read(texts or ("",), gate.ngrams, gate.encoder), gate.gate)
        labels = np.array([_label(gate, c) for c in known], np.int64)
        spoken, ranks = tuple(words(text) for text in texts), np.arange(len(known))
        unused = np.zeros(len(known), np.float32)  # corrections are no evidence of what is in scope
        return cls(state, known, spoken, Neighbours(rows, labels, ranks, texts, unused))

    def correct(self, gate: GateRouter, query: str, batch: Batch, decision: Decision) -> Decision:
        """The decision, or that of the nearest correction if it is near enough."""
        last, near = self._nearest(gate, query, batch)
        if last is None:
            return decision
        right = self.known[last].right
        reason = (
            f"{right or 'base'}: corrected, near {near:.2f} {self.known[last].text[:80]!r} "
            f"({self.known[last].id})"
        )
        mix = Mix({right: 1}) if right else Mix()
        reasons, id = (reason, *decision.reasons), self.known[last].id
        return replace(decision, mix=mix, reasons=reasons, correction=id)

    def _nearest(self, gate: GateRouter, query: str, batch: Batch) -> tuple[int | None, float]:
        """Which correction decides, if one does, and its cosine; the newest of the same words."""
        if not self.known:
            return None, 0.0
        said = words(query)
        if same := [i for i, spoken in enumerate(self.spoken) if spoken == said]:
            return same[-1], 1.0
        here = place(batch, gate.gate)
        cosines = self.places.similarities(here)[0]
        best = int(cosines.argmax())
        near = float(cosines[best])
        if near < NEAR[gate.encoder is not None]:
            return None, near
        others = gate.neighbours.labels != self.places.labels[best]
        rival = gate.neighbours.similarities(here)[0][others].max(initial=-1)
        return (best if near >= rival - TIE else None), near


def _label(gate: GateRouter, correction: Correction) -> int:
    return -1 if correction.right is None else gate.adapters.index(correction.right)
