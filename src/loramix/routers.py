"""Routers by their names: the words that choose one on the command line and in `loramix.yaml`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from loramix.errors import RouteError
from loramix.library import Library, check_fingerprint
from loramix.lm import ROUTER, load_router
from loramix.mix import Mix
from loramix.route import Router

if TYPE_CHECKING:
    from loramix.base import Base

KINDS = "auto, nearest, spectral, fixed:MIX, rules:FILE, or the folder of a fitted router"


def open_router(what: str, library: Library, base: Callable[[], Base]) -> Router:
    """A library's router by its kind, or the fitted one in a folder.

    "auto" and "nearest" go by the library's fitted router, "nearest:FOLDER" by that of a folder.
    `base` is opened by "spectral" alone. Raises RouteError, MixSyntaxError, BaseError.
    """
    kind, _, of = what.partition(":")
    if what == "auto":
        return load_router(library)
    if what == "spectral":
        return spectral_router(library, base())
    if kind == "nearest":
        return nearest_router(Path(of) if of else library.folder / ROUTER)
    if kind == "fixed" and of:
        return fixed_router(of)
    if kind == "rules" and of:
        return rules_router(of)
    if what and Path(what).is_dir():
        from loramix.route.gate import GateRouter

        return GateRouter.load(Path(what))
    raise RouteError(f"No router is called {what!r}; expected {KINDS}.")


def fitted_router(
    library: Library,
    *,
    thresholds: Mapping[str, float] | None = None,
    fades: bool | None = None,
    top: int | None = None,
) -> Router:
    """The library's fitted router with its corrections, some of its settings replaced.

    `thresholds` are least in-scope scores, as its reasons show them; `fades` makes weights sum to
    1 - P(none); `top` is the most adapters of a mix. Raises RouteError, UnknownAdapter.
    """
    from loramix.route.calibration import with_thresholds
    from loramix.route.feedback import CorrectedRouter

    found = load_router(library)
    gate = with_thresholds(found.gate, thresholds or {})
    gate = replace(gate, fades=gate.fades if fades is None else fades, top=top or gate.top)
    return CorrectedRouter(gate, found.log)


def fixed_router(mix: str) -> Router:
    """One mix for every query. Raises MixSyntaxError."""
    from loramix.route.fixed import FixedRouter

    return FixedRouter(Mix.parse(mix))


def rules_router(file: str) -> Router:
    """Adapters by patterns. Raises RouteError."""
    from loramix.route.fixed import RulesRouter

    return RulesRouter.load(Path(file))


def nearest_router(folder: Path) -> Router:
    """The vote of the examples that a fitted router stores. Raises RouteError."""
    from loramix.route.gate import GateRouter
    from loramix.route.nearest import NearestRouter

    return NearestRouter.of(GateRouter.load(folder))


def spectral_router(library: Library, base: Base) -> Router:
    """By the directions of all adapters of a library. Raises RouteError, AdapterError."""
    from loramix.route.spectral import SpectralRouter

    adapters = [library.load(name) for name in library.names()]
    for adapter in adapters:
        check_fingerprint(adapter, base)
    return SpectralRouter.of(base, adapters)
