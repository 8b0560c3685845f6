"""From settings to a service: what they name is checked, brought in and opened."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from loramix.adapter import Adapter
from loramix.errors import AdapterError, LoramixError, SettingsError, UnknownAdapter
from loramix.folders import own_database, own_library
from loramix.formats.config import interpret, load_config
from loramix.formats.folder import CONFIG, find_weights
from loramix.formats.hub import is_hub_id
from loramix.library import Library
from loramix.lm import ROUTER, check_mix, has_router
from loramix.mix import Mix
from loramix.route.saved import state
from loramix.serve.service import Live, Service
from loramix.serve.settings import AdapterSettings, BaseSettings, Settings

if TYPE_CHECKING:
    from loramix.base import Base
    from loramix.serve.training import Training


def problems(settings: Settings) -> list[str]:
    """What would fail when the service is opened, as far as that shows without reading weights."""
    return [str(error) for error in _problems(settings)]


def open_service(settings: Settings, *, insecure: bool = False) -> Service:
    """Open the database and the base, bring adapters in, start the engine. Raises LoramixError."""
    from loramix import lm
    from loramix.engine.local import LocalEngine
    from loramix.store import Store

    for error in _problems(settings):
        raise error
    shelf, base = settings.shelf, settings.model
    url = settings.database or own_database()
    with ExitStack() as opened:
        store = opened.enter_context(Store.open(url))
        for key in settings.keys:
            store.keys.put(**key.model_dump())
        for adapter in settings.all_adapters:
            _bring_in(adapter, shelf)
        model = opened.enter_context(
            lm.open(
                base.model,
                shelf.folder,
                dtype=base.dtype,
                device=base.device,
                revision=base.revision,
                quantize=base.quantize,
                router=settings.router.opened(shelf),
                engine=settings.engine.options(),
            )
        )
        assert isinstance(model.engine, LocalEngine)
        for adapter in settings.all_adapters:
            if adapter.precision != "auto":
                precise = _as_precise(shelf.load(adapter.name), adapter.precision)
                model.engine.add(precise, aligned=False)
        opened.pop_all()
    return Service(
        model,
        store,
        insecure=insecure,
        limits=settings.limits.limits(),
        training=_training(settings, url, model.engine.base),
        reopened=settings.router.reopened,
        roots=tuple(Path(root).resolve() for root in settings.roots),
        log_prompts=settings.log_prompts,
        cors=settings.cors,
        system_prompts={a.name: a.system_prompt for a in settings.all_adapters if a.system_prompt},
        live=Live(default=settings.mix, router=state(shelf.folder / ROUTER)),
    )


def _training(settings: Settings, url: str, base: Base) -> Training | None:
    if os.name == "nt":
        return None
    from loramix.serve.training import Training

    model = settings.model.model
    folder = Path(settings.training) if settings.training else own_library().parent
    return Training(
        folder=folder.absolute(),
        database=url,
        model=str(Path(model).absolute()) if Path(model).is_dir() else model,
        base=base,
        revision=settings.model.revision,
        refits=settings.router.kind == "auto",
    )


def _as_precise(adapter: Adapter, precision: str) -> Adapter:
    import torch

    dtype = getattr(torch, precision)
    return replace(adapter, pairs={name: pair.to(dtype) for name, pair in adapter.pairs.items()})


def _bring_in(adapter: AdapterSettings, shelf: Library) -> None:
    """Copy an adapter into the library, unless its very content is there under its name."""
    if adapter.model is None:
        return
    if adapter.name not in shelf.names():
        shelf.add(adapter.model, name=adapter.name, revision=adapter.revision)
        return
    given = shelf.read(adapter.model, name=adapter.name, revision=adapter.revision)
    if given.digest != shelf.load(adapter.name).digest:
        raise AdapterError(
            f"The library {shelf.folder} has another adapter called {adapter.name!r} than "
            f"{adapter.model}; remove it with `loramix adapters remove`, or give another name."
        )


def _problems(settings: Settings) -> Iterator[LoramixError]:
    base, shelf = settings.model, settings.shelf
    is_here = base.model == "pocket" or (Path(base.model) / "config.json").is_file()
    if not is_here and not is_hub_id(base.model):
        yield SettingsError(
            f"base: {base.model} is no folder with a config.json; expected a model's folder, a hub "
            f"id or pocket."
        )
    for adapter in settings.all_adapters:
        try:
            _check(adapter, base, shelf)
        except LoramixError as error:
            yield SettingsError(f"Adapter {adapter.name!r}: {error}")
    for root in settings.roots:
        if not Path(root).is_dir():
            yield SettingsError(f"roots: {root} is no folder.")
    checks = (("default_mix", _check_default), ("router", _check_router), ("keys", _check_keys))
    for name, check in checks:
        try:
            check(settings)
        except LoramixError as error:
            yield SettingsError(f"{name}: {error}")


def _check(adapter: AdapterSettings, base: BaseSettings, shelf: Library) -> None:
    if adapter.device not in ("auto", base.device):
        raise SettingsError(
            f"device is {adapter.device!r} and the base's {base.device!r}; an adapter lies where "
            f"its base does, so leave it out."
        )
    if adapter.model is None:
        shelf.card(adapter.name)
    elif (folder := Path(adapter.model)).is_dir():
        find_weights(folder)
        interpret(load_config(folder / CONFIG), str(folder / CONFIG))
    elif not folder.exists() and not is_hub_id(adapter.model):
        raise SettingsError(f"{adapter.model} does not exist; expected a folder, file or hub id.")


def _check_default(settings: Settings) -> None:
    known = _known(settings)
    if settings.mix == "auto":
        if settings.router.kind == "none":
            raise SettingsError("'auto' needs the router that router: none leaves out.")
        if settings.router.kind == "auto" and not has_router(settings.shelf):
            check_mix("auto", settings.shelf)
    elif settings.mix:
        for name in Mix.parse(settings.mix):
            if name not in known:
                check_mix(name, settings.shelf)


def _check_router(settings: Settings) -> None:
    router, known = settings.router.opened(settings.shelf), _known(settings)
    for name in () if isinstance(router, bool) or callable(router) else router.adapters:
        if name not in known:
            raise UnknownAdapter(name, sorted(known))


def _check_keys(settings: Settings) -> None:
    known = _known(settings)
    for name in (name for key in settings.keys for name in key.adapters or ()):
        if name not in known:
            raise UnknownAdapter(name, sorted(known))


def _known(settings: Settings) -> set[str]:
    return {*settings.shelf.names(), *(adapter.name for adapter in settings.all_adapters)}
