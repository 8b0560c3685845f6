"""What the turns of a conversation do to the router's choice, on held-out rows.

Two turns each; the first is a held-out query of a task. The second is, in equal numbers,

    switch    a query of another task                       -> that task
    stay      another query of the same task                -> the task
    elliptic  one of `FOLLOW_UPS`, which say no subject      -> the task
    said      what a customer told a bank (NLU++, banking), after a banking query -> banking
    foreign   an out-of-scope query of CLINC150             -> the base
    hotel     what a guest told a hotel (NLU++), after a banking query -> the base; many are as
              short as "yes, for the 5th", and nobody could tell

The two numbers of `turns.follow` are chosen on four fifths of the rows and used on the fifth.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from loramix.route import Decision
from loramix.route.gate import GateRouter
from loramix.route.turns import follow
from recipes.pocket import routing
from recipes.pocket.tasks import TASKS, load, rows

KINDS = ("switch", "stay", "elliptic", "said", "foreign", "hotel")
FOLDS = 5
GRID = tuple(
    itertools.product((0.0, 14.0, 16.0, 18.0, 20.0, 22.0, 24.0, 28.0), (0.0, 0.5, 1.0, 2.0))
)
FOLLOW_UPS = """\
why? | why is that? | and the second one? | what about the other one? | and in the other case?
how so? | can you explain that? | are you sure? | and then? | what do you mean? | really? | go on
could you say that again? | shorter please | say it in other words | and the next one? | what else?
anything else i should know? | how long would that take? | is that all? | and if it does not work?
no, the first one | the same for last month | what if i do not have it? | and for my wife?
ok, and after that? | please try again | that is not what i asked | give me another one
do it once more | but what about tomorrow? | and how much would that be? | which one is better?
i did that already | it still does not work | yes please | no thanks, the other | how do you know?
and what does it mean? | can you check that again?""".replace("\n", " | ").split(" | ")

Numbers = tuple[float, float]  # `elliptic` and `margin` of follow


class Row(NamedTuple):
    kind: str
    turns: tuple[str, str]
    task: str  # "" is the base


def run(data: Path, pocket: Path, count: int) -> None:
    """Print the share decided right of each kind of row: last turn alone, both joined, followed."""
    router = GateRouter.load(pocket / "library" / "_router")
    found, decide = made(data, count), cache(router.decide)

    def followed(row: Row, numbers: Numbers) -> bool:
        elliptic, margin = numbers
        say = cache(router.information)
        return hit(row, follow(decide, say, row.turns, elliptic=elliptic, margin=margin))

    chosen, right = crossed(found, followed)
    print(f"{'percent right':34}" + "".join(f"{kind:>10}" for kind in KINDS))
    print(line("last turn alone", found, [hit(r, decide(r.turns[1])) for r in found]))
    print(line("both as one text", found, [hit(r, decide("\n".join(r.turns))) for r in found]))
    print(line("follow, numbers of other rows", found, right))
    print(f"chosen in each fold (nats of information, of margin): {chosen}")


def made(data: Path, count: int) -> list[Row]:
    """Rows of every kind, `count` of each, in turn."""
    rng = random.Random(7)
    held = {name: [e.query for e in load(name, data).heldout] for name in TASKS}
    told: dict[str, list[str]] = {"banking": [], "hotels": []}
    for row in rows(data / "banking77/nlupp.jsonl.gz"):
        told[row["domain"]].append(row["text"])
    strangers = routing.foreign(data)
    for texts in (*told.values(), strangers):
        rng.shuffle(texts)
    found = []
    for i in range(count):
        name = TASKS[i % len(TASKS)]
        other = rng.choice([task for task in TASKS if task != name])
        first, second, third, bank = (rng.choice(held[n]) for n in (name, name, other, "banking"))
        found += [
            Row("switch", (first, third), other),
            Row("stay", (first, second), name),
            Row("elliptic", (first, FOLLOW_UPS[i // len(TASKS) % len(FOLLOW_UPS)]), name),
            Row("said", (bank, told["banking"][i]), "banking"),
            Row("foreign", (first, strangers[i]), ""),
            Row("hotel", (bank, told["hotels"][i]), ""),
        ]
    return found


def crossed(
    found: Sequence[Row], right: Callable[[Row, Numbers], bool]
) -> tuple[list[Numbers], list[bool]]:
    """The numbers that are best on the other folds, by fold; whether each row is right so."""
    hits = {numbers: [right(row, numbers) for row in found] for numbers in GRID}
    place = [i // len(KINDS) % FOLDS for i in range(len(found))]
    chosen = []
    for fold in range(FOLDS):
        others = [i for i, p in enumerate(place) if p != fold]
        chosen.append(max(GRID, key=lambda n: sum(hits[n][i] for i in others)))
    return chosen, [hits[chosen[p]][i] for i, p in enumerate(place)]


def hit(row: Row, decision: Decision) -> bool:
    return set(decision.mix.top(1)) == ({row.task} if row.task else set())


def line(name: str, found: Sequence[Row], right: Sequence[bool]) -> str:
    shares = []
    for kind in KINDS:
        mine = [hit for row, hit in zip(found, right, strict=True) if row.kind == kind]
        shares.append(f"{100 * sum(mine) / len(mine):10.1f}")
    return f"{name:34}" + "".join(shares)
