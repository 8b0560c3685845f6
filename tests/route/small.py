"""A small world for the router's tests: three trades with frames and words of their own."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from loramix.route.abstain import background
from loramix.route.encode import NgramEncoder
from loramix.route.gate import GateRouter

FRAMES = {
    "garden": (
        "when should i plant {0} in the {1}|how much water do {0} need in a {1}|"
        "prune the {0} by the {1}",
        "roses|tulips|beans|tomatoes|ferns|lavender|cherries|onions",
        "greenhouse|garden bed|clay pot|shady corner|orchard",
    ),
    "sailing": (
        "how do i reef the {0} in a {1}|is the {0} safe during a {1}|lower the {0} before the {1}",
        "mainsail|jib|spinnaker|anchor|mast|rudder|keel|halyard",
        "squall|strong tide|north wind|swell|calm",
    ),
    "baking": (
        "knead the {0} until it is {1}|why is my {0} not {1}|bake the {0} until {1}",
        "dough|rye loaf|brioche|sponge|pastry|bagel|crust|scone",
        "golden|risen|elastic|crisp|cooled",
    ),
}


def rows(name: str) -> list[str]:
    frames, firsts, seconds = (part.split("|") for part in FRAMES[name])
    return [f.format(a, b) for f, a, b in itertools.product(frames, firsts, seconds)]


def train() -> dict[str, list[str]]:
    return {name: rows(name)[::2] for name in FRAMES}


def held_out() -> dict[str, list[str]]:
    return {name: rows(name)[1::2] for name in FRAMES}


def fitted(examples: Mapping[str, Sequence[str]] | None = None, **options: Any) -> GateRouter:
    """Fitted on `examples` and some of the packaged background, to be quick."""
    settings = {"encoder": NgramEncoder(), "foreign": background()[::30], **options}
    return GateRouter.fit(train() if examples is None else examples, **settings)
