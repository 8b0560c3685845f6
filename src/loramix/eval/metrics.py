"""How well an answer agrees with its reference, from 0 to 1."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from importlib import import_module

from loramix.chat import Example
from loramix.errors import BadRequest

Metric = Callable[[str, str], float]  # answer, reference


def exact(answer: str, reference: str) -> float:
    """Equal, but for spaces around them."""
    return float(answer.strip() == reference.strip())


def contains(answer: str, reference: str) -> float:
    """The reference is in the answer, in whatever case."""
    return float(reference.strip().casefold() in answer.casefold())


def f1(answer: str, reference: str) -> float:
    """Of the words both have in common, as for SQuAD (https://arxiv.org/abs/1606.05250)."""
    said, wanted = Counter(_words(answer)), Counter(_words(reference))
    common = (said & wanted).total()
    return 2 * common / (said.total() + wanted.total()) if said or wanted else 1.0


def agreement(metric: Metric, answer: str, example: Example) -> float:
    """Of an answer with an example's own; BadRequest for a metric that leaves 0 to 1."""
    found = float(metric(answer, example.answer))
    if not 0 <= found <= 1:
        raise BadRequest(f"The metric gave {found}; expected a number from 0 to 1.")
    return found


METRICS: dict[str, Metric] = {"exact": exact, "contains": contains, "f1": f1}


def find_metric(name: str) -> Metric:
    """A metric by name, or a function of yours as "package.module:function".

    Raises BadRequest for anything else.
    """
    if name in METRICS:
        return METRICS[name]
    module, colon, function = name.partition(":")
    if not colon:
        raise BadRequest(
            f"Unknown metric {name!r}; expected one of {', '.join(METRICS)}, or module:function."
        )
    try:
        found: Metric = getattr(import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise BadRequest(f"No metric {name!r}: {error}; expected module:function.") from error
    return found


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())
