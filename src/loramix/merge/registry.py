"""Merge methods by name: each is one decorated pure function, beside its paper.

Four decorators, for what a method has to see of a layer's updates:

    @coefficients   only their inner products: one number per update          -> factors
    @on_cores       their R by R cores (core.py): rotations, singular values  -> factors
    @on_factors     the a and b of each                                       -> factors
    @on_rows        every entry, after facts about the whole layer            -> rows

The keyword-only parameters of the function, all numbers, are what `--set` changes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from loramix.errors import MergeError
from loramix.lora import Pair
from loramix.merge.core import Core
from loramix.merge.rows import Combine
from loramix.merge.updates import Updates

Function = TypeVar("Function", bound=Callable[..., Any])
Outcome = Pair | Combine  # one update as factors, or how rows become one's


@dataclass(frozen=True, slots=True)
class Method:
    """How the updates of a layer become one."""

    name: str
    source: str  # the paper, for the model card
    summary: str
    defaults: Mapping[str, float]
    apply: Callable[..., Outcome]  # (updates, **settings)
    reads_inputs: bool = False  # needs `Updates.inputs`

    @property
    def makes_factors(self) -> bool:
        """Whether the result has a low rank by construction (DoRA updates apart)."""
        return not getattr(self.apply, "by_rows", False)


METHODS: dict[str, Method] = {}


ELSEWHERE = {  # names in PEFT and mergekit, and what does here what they are meant to do
    "cat": "sum",
    "linear": "sum",
    "task-arithmetic": "sum",
    "svd": "sum with a rank",
    "dare-linear": "dare",
    "multislerp": "mean-direction",
    "nuslerp": "slerp",
}


def find(name: str) -> Method:
    """The method of this name; MergeError with what it is called here, or the names there are."""
    if name in METHODS:
        return METHODS[name]
    dashed = name.lower().replace("_", "-")
    if known := dashed if dashed in METHODS else ELSEWHERE.get(dashed):
        raise MergeError(f"No merge method {name!r}; here it is {known}.")
    raise MergeError(f"No merge method {name!r}; expected one of {', '.join(sorted(METHODS))}.")


def coefficients(name: str, *, source: str) -> Callable[[Function], Function]:
    """Register f(updates, **settings) -> [K]: the merged update is sum_k f_k dW_k, exactly."""

    def register(weigh: Function) -> Function:
        def apply(updates: Updates, **settings: float) -> Outcome:
            return updates.summed(weigh(updates, **settings))

        return _add(name, source, weigh, apply)

    return register


def on_cores(name: str, *, source: str) -> Callable[[Function], Function]:
    """Register f(cores [K, P, Q], weights [K], **settings) -> [P, Q]."""

    def register(merge: Function) -> Function:
        def apply(updates: Updates, **settings: float) -> Outcome:
            core = Core.of(updates, name)
            return core.pair(merge(core.cores, updates.weights.double(), **settings))

        return _add(name, source, merge, apply)

    return register


def on_factors(
    name: str, *, source: str, reads_inputs: bool = False
) -> Callable[[Function], Function]:
    """Register f(updates, **settings) -> Pair."""

    def register(merge: Function) -> Function:
        return _add(name, source, merge, merge, reads_inputs=reads_inputs)

    return register


def on_rows(name: str, *, source: str) -> Callable[[Function], Function]:
    """Register f(view, **settings) -> Combine: look at the whole layer, then at any rows."""

    def register(look: Function) -> Function:
        def apply(updates: Updates, **settings: float) -> Outcome:
            combine: Combine = look(updates.view(), **settings)
            return combine

        apply.by_rows = True  # type: ignore[attr-defined]
        return _add(name, source, look, apply)

    return register


def check_share(name: str, value: float, *, low: float = 0.0) -> None:
    """MergeError unless low <= value <= 1."""
    if not low <= value <= 1:
        raise MergeError(f"{name} is {value:g}; expected a share from {low:g} to 1.")


def _add(
    name: str,
    source: str,
    function: Function,
    apply: Callable[..., Outcome],
    *,
    reads_inputs: bool = False,
) -> Function:
    parameters = inspect.signature(function).parameters.values()
    defaults = {p.name: float(p.default) for p in parameters if p.kind is p.KEYWORD_ONLY}
    summary = (function.__doc__ or "").strip().split("\n")[0].rstrip(".")
    METHODS[name] = Method(name, source, summary, defaults, apply, reads_inputs)
    return function
