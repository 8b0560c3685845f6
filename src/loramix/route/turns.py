"""Which turn decides: the last one, unless it says too little by itself.

"And the second one?" belongs to no adapter by itself, and to that of the turn before all the same.
So a turn that falls to the base, and has less information than a question of its own would have,
takes over the mix of the turn before; a change of subject says more, and stays with the base.
And a turn that suits the present adapter almost as well as another one does not switch.

All of it is computed from the messages given: nothing is remembered between calls, so the same
conversation always gets the same mix, and what is not sent is forgotten.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from loramix.chat import Message
from loramix.errors import RouteError
from loramix.mix import Mix
from loramix.route import Decision

LOOKBACK = 3  # user turns before the last one that may lend it their mix
ELLIPTIC = 22.0  # nats of information; with less a turn leans on the one before
MARGIN = 2.0  # nats by which another adapter must be likelier than the present one


def user_turns(messages: Sequence[Message]) -> list[str]:
    """What the user said, first to last; RouteError if that is nothing."""
    found = [message.content for message in messages if message.role == "user"]
    if not found:
        raise RouteError("No user message to route on; a conversation needs one at least.")
    return found


def follow(
    decide: Callable[[str], Decision],
    information: Callable[[str], float],
    turns: Sequence[str],
    *,
    elliptic: float = ELLIPTIC,
    margin: float = MARGIN,
) -> Decision:
    """Decide on the last of the user's turns in the light of those before it.

    `decide` is asked about one text, and about an earlier one only where the last leaves it open;
    `information` is what a text says, in nats. A corrected decision stands as it is. The scores
    are those of the last turn by itself.
    """
    *before, turn = turns[-1 - LOOKBACK :]
    found = decide(turn)
    leans = not found.mix and information(turn) < elliptic
    if not before or found.correction or not (leans or _lead(found) < margin):
        return found
    earlier = follow(decide, information, before, elliptic=elliptic, margin=margin).mix
    if not earlier:
        return found
    if leans:
        return _kept(found, earlier, "too short to stand alone, it follows the turn before")
    if (gap := _gap(found, next(iter(earlier.top(1))))) < margin:
        return _kept(found, earlier, f"stays; a switch needs {margin:g} nats, this has {gap:.2f}")
    return found


def _lead(found: Decision) -> float:
    """Nats between the one adapter that was chosen and the next; inf if not one was chosen."""
    best, second, *_ = [*sorted(found.scores.values(), reverse=True), 0.0, 0.0]
    return _nats(best, second) if len(found.mix) == 1 else math.inf


def _gap(found: Decision, present: str) -> float:
    """Nats by which the chosen adapter is likelier than the present one; inf if it is that one."""
    (chosen,) = found.mix.top(1)
    return math.inf if chosen == present else _nats(found.scores[chosen], found.scores[present])


def _nats(likelier: float, other: float) -> float:
    return math.log(max(likelier, 1e-30) / max(other, 1e-30))


def _kept(found: Decision, mix: Mix, why: str) -> Decision:
    return replace(found, mix=mix, reasons=(f"{mix}: {why}", *found.reasons))
