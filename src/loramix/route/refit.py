"""All adapters learned together anew, and the corrections with them, unless these cost anything.

A fifth of the router's own rows is held out, and the gate is fitted on the rest with and without
the corrections. They join if the share of held-out rows that is decided right does not fall; what
was joined before and taken back since is unlearned.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from loramix.route.blend import look
from loramix.route.change import changing
from loramix.route.feedback import Correction, FeedbackLog
from loramix.route.gate import GateRouter
from loramix.route.rows import Rows
from loramix.route.saved import state


class Refit(NamedTuple):
    """What came of a refit; scores are shares of held-out rows that are decided right."""

    router: GateRouter | None  # None if there was nothing to learn, or the score fell
    before: float = math.nan  # without the corrections; nan where there were none to judge
    after: float = math.nan
    joined: tuple[str, ...] = ()  # the corrections that the gate learned anew


def refit_in(folder: Path) -> Refit:
    """Learn the router of a folder anew, and replace it at once when that is done.

    If somebody replaces it meanwhile, it begins again with theirs. Raises RouteError.
    """
    log = FeedbackLog(folder)
    while True:
        begun = state(folder)
        found = refit(GateRouter.load(folder), log)
        if found.router is None:
            return found
        with changing(folder):
            if state(folder) == begun:
                found.router.save(folder)
                if found.joined:
                    log.join(found.joined)
                return found


def refit(gate: GateRouter, log: FeedbackLog) -> Refit:
    """Teach the gate the corrections of a log, unless that costs anything on held-out rows.

    Adapters that are fresh are learned in any case. The caller saves the router, then joins the
    corrections.
    """
    active = [c for c in log.corrections() if c.right is None or c.right in gate.adapters]
    dropped = {(c.right or "", c.text) for c in log.learned()}
    own = {
        name: [text for text in texts if (name, text) not in dropped]
        for name, texts in gate.examples.items()
    }
    joined = tuple(c.id for c in active if c.text not in own[c.right or ""])
    if not joined and not dropped:
        return Refit(gate.refit() if gate.fresh else None)
    before, after = _compared(gate, own, active)
    if after >= before:
        return Refit(gate.refitted(_taught(own, active)), before, after, joined)
    return Refit(gate.refit() if gate.fresh else None, before, after)


def _compared(
    gate: GateRouter, own: Mapping[str, Sequence[str]], corrections: Sequence[Correction]
) -> tuple[float, float]:
    """Scores of gates fitted without the held-out rows: without and with the corrections."""
    rows = gate.rows()
    held = rows.take(np.flatnonzero(rows.fold(0)))
    hidden = set(held.texts)
    rest = {name: [t for t in texts if t not in hidden] for name, texts in own.items()}
    taught = gate.refitted(_taught(rest, corrections))
    return score(gate.refitted(rest), held), score(taught, held)


def score(gate: GateRouter, rows: Rows) -> float:
    """Share of rows whose first choice is their adapter, or the base for the background's."""
    evidence = look(rows.batch, gate.gate, gate.neighbours)
    winner = evidence.log_probs[:, :-1].argmax(axis=1)
    fits = gate.abstain.scores(evidence) >= np.asarray(gate.abstain.thresholds)[winner]
    choice = np.where(fits, winner, rows.none)
    return float(np.mean(choice == rows.labels)) if len(choice) else 1.0


def _taught(
    examples: Mapping[str, Sequence[str]], corrections: Sequence[Correction]
) -> dict[str, list[str]]:
    """Examples with each corrected text under the adapter that is right, and no other."""
    right = {c.text: c.right or "" for c in corrections}  # the newest word on a text
    found = {name: [t for t in texts if t not in right] for name, texts in examples.items()}
    for text, name in right.items():
        found[name].append(text)
    return found
