"""`loramix.yaml`: what a server serves and how. Every key is honoured or refused, none is ignored.

Unknown keys are errors that say the file, the line and the nearest name. `loramix validate` finds
what is wrong without reading a weight; `open_service` makes the service.
"""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from loramix.adapter import Adapter
from loramix.errors import (
    AdapterError,
    LoramixError,
    MixSyntaxError,
    SettingsError,
    UnknownAdapter,
)
from loramix.formats.config import interpret, load_config
from loramix.formats.folder import CONFIG, find_weights
from loramix.formats.hub import is_hub_id
from loramix.library import Library
from loramix.lm import check_mix, default_library, has_router
from loramix.mix import Mix, check_name
from loramix.route import Router
from loramix.route.fixed import FixedRouter, RulesRouter
from loramix.serve import overlays
from loramix.serve.limits import Limits
from loramix.serve.service import Live, Service

Precision = Literal["auto", "float32", "bfloat16", "float16"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class BaseSettings(Section):
    """The base; `base: pocket` is short for `base: {model: pocket}`."""

    model: str = "pocket"
    dtype: Precision = "auto"
    device: str = "auto"
    revision: str | None = None
    quantize: Literal["none", "int8"] = "none"


class AdapterSettings(Section):
    """One adapter. Without `model` the library holds it already; with it, it is copied in."""

    name: str
    model: str | None = None  # a folder, a file or a hub id
    revision: str | None = None
    weight: float | None = Field(default=None, allow_inf_nan=False)  # in the default mix
    precision: Precision = "auto"  # "auto" is the base's
    device: str = "auto"  # adapters lie where the base lies: anything else is refused
    system_prompt: str = ""  # of chats that it answers, unless they bring one

    @field_validator("name")
    @classmethod
    def _name(cls, name: str) -> str:
        try:
            return check_name(name)
        except MixSyntaxError as error:
            raise ValueError(str(error).rstrip(".")) from error

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if self.revision and not self.model:
            raise ValueError("revision is said without model; name the hub id it belongs to")
        return self


class PeftAdapter(Section):
    """An entry of `peft_adapters`, as other servers' component files have it."""

    type: Literal["lora"] = "lora"
    name: str
    model: str
    revision: str | None = None
    weight: float = Field(1.0, allow_inf_nan=False)
    precision: Precision = "auto"
    quantization: Literal["none"] | None = None  # factors are small: they are never rounded
    low_cpu_mem_usage: bool = True  # either way: tensors are read one by one

    def as_adapter(self) -> AdapterSettings:
        return AdapterSettings(
            name=self.name,
            model=self.model,
            revision=self.revision,
            weight=self.weight,
            precision=self.precision,
        )


class Component(Section):
    """A model component of those files: its base, and its adapters at their weights."""

    type: Literal["model"] = "model"
    task: Literal["chat-completion", "text-generation"] = "chat-completion"
    model: str
    peft_adapters: tuple[PeftAdapter, ...] = Field((), strict=False)


class RouterSettings(Section):
    """Who answers `auto`; `router: none` is short for `router: {kind: none}`."""

    kind: Literal["auto", "none", "fixed", "rules"] = "auto"
    mix: str | None = None  # of fixed
    file: str | None = None  # of rules

    @model_validator(mode="after")
    def _belongs(self) -> Self:
        for name, value, kind in (("mix", self.mix, "fixed"), ("file", self.file, "rules")):
            if (value is None) == (self.kind == kind):
                raise ValueError(f"kind {kind} needs {name}, and no other kind has it")
        return self

    def opened(self) -> bool | Router:
        """As `lm.open` takes it. Raises MixSyntaxError, RouteError."""
        if self.mix is not None:
            return FixedRouter(Mix.parse(self.mix))
        if self.file is not None:
            return RulesRouter.load(Path(self.file))
        return self.kind == "auto"


class EngineSettings(Section):
    """Of the running batch; see `LocalEngine`. What is not said is its own default."""

    max_batch: int | None = Field(default=None, ge=1)
    max_queue: int | None = Field(default=None, ge=1)
    step_tokens: int | None = Field(default=None, ge=1)
    kv_bytes: int | None = Field(default=None, ge=1)
    adapter_bytes: int | None = Field(default=None, ge=1)
    num_threads: int | None = Field(default=None, ge=1)
    reuse: bool | None = None  # of computed prompts, by requests of the same mix

    def options(self) -> dict[str, Any]:
        return self.model_dump(exclude_none=True)


class LimitSettings(Section):
    """See `Limits`; what is not said is its default."""

    body_bytes: int | None = Field(default=None, ge=1)
    upload_bytes: int | None = Field(default=None, ge=1)
    answer_tokens: int | None = Field(default=None, ge=1)
    n: int | None = Field(default=None, ge=1, le=128)
    timeout_s: float | None = Field(default=None, gt=0)
    shutdown_s: float | None = Field(default=None, ge=0)

    def limits(self) -> Limits:
        return replace(Limits(), **self.model_dump(exclude_none=True))


class Settings(Section):
    """All of `loramix.yaml`."""

    base: BaseSettings = BaseSettings()
    library: str | None = None  # folder of adapters; pocket's own for pocket, else yours
    adapters: tuple[AdapterSettings, ...] = Field((), strict=False)
    component: Component | None = None
    peft_adapters: tuple[PeftAdapter, ...] = Field((), strict=False)
    default_mix: str | None = None  # of requests that name none
    router: RouterSettings = RouterSettings()
    engine: EngineSettings = EngineSettings()
    limits: LimitSettings = LimitSettings()
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)  # 0 is any that is free
    roots: tuple[str, ...] = Field((), strict=False)  # folders that adapters may be loaded from
    cors: tuple[str, ...] = Field((), strict=False)  # origins whose pages may call
    database: str | None = None  # URL; $LORAMIX_DATABASE, or a file of yours
    log_file: str | None = None  # beside stderr; `loramix logs` reads it
    log_prompts: bool = False

    @field_validator("router", mode="before")
    @classmethod
    def _short_router(cls, router: Any) -> Any:
        return {"kind": router} if isinstance(router, str) else router

    @field_validator("base", mode="before")
    @classmethod
    def _short(cls, base: Any) -> Any:
        return {"model": base} if isinstance(base, str) else base

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.component and (self.peft_adapters or self.base.model != "pocket"):
            raise ValueError("component names the base and its adapters; leave the others out")
        names = [adapter.name for adapter in self.all_adapters]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two adapters are called {name!r}; rename one")
        return self

    @property
    def model(self) -> BaseSettings:
        """The base, whichever way it is said."""
        if self.component is None:
            return self.base
        return self.base.model_copy(update={"model": self.component.model})

    @property
    def all_adapters(self) -> tuple[AdapterSettings, ...]:
        """The adapters, whichever way they are said."""
        block = self.component.peft_adapters if self.component else self.peft_adapters
        return (*self.adapters, *(entry.as_adapter() for entry in block))

    @property
    def shelf(self) -> Library:
        return Library(Path(self.library) if self.library else default_library(self.model.model))

    @property
    def mix(self) -> str:
        """The default mix: as said, or of the adapters that state a weight; "" leaves it open."""
        if self.default_mix is not None:
            return self.default_mix
        weights = {a.name: a.weight for a in self.all_adapters if a.weight is not None}
        return str(Mix(weights)) if weights else ""


def load(files: Sequence[Path], assignments: Sequence[str] = ()) -> Settings:
    """Read files over one another, then `a.b=c`; SettingsError names every mistake."""
    found = overlays.read(files, assignments)
    try:
        return Settings.model_validate(found.data)
    except ValidationError as error:
        lines = [_sentence(found, problem) for problem in error.errors()]
        raise SettingsError(" ".join(lines)) from None


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
    store = Store.open(settings.database or lm.own_database())
    shelf, base = settings.shelf, settings.model
    for adapter in settings.all_adapters:
        _bring_in(adapter, shelf)
    opened = lm.open(
        base.model,
        shelf.folder,
        dtype=base.dtype,
        device=base.device,
        revision=base.revision,
        quantize=base.quantize,
        router=settings.router.opened(),
        engine=settings.engine.options(),
    )
    try:
        assert isinstance(opened.engine, LocalEngine)
        for adapter in settings.all_adapters:
            if adapter.precision != "auto":
                precise = _as_precise(shelf.load(adapter.name), adapter.precision)
                opened.engine.add(precise, aligned=False)
        return Service(
            opened,
            store,
            insecure=insecure,
            limits=settings.limits.limits(),
            roots=tuple(Path(root).resolve() for root in settings.roots),
            log_prompts=settings.log_prompts,
            cors=settings.cors,
            system_prompts={
                a.name: a.system_prompt for a in settings.all_adapters if a.system_prompt
            },
            live=Live(default=settings.mix),
        )
    except BaseException:
        opened.close()
        raise


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
    for name, check in (("default_mix", _check_default), ("router", _check_router)):
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
    router, known = settings.router.opened(), _known(settings)
    for name in () if isinstance(router, bool) else router.adapters:
        if name not in known:
            raise UnknownAdapter(name, sorted(known))


def _known(settings: Settings) -> set[str]:
    return {*settings.shelf.names(), *(adapter.name for adapter in settings.all_adapters)}


def _sentence(found: overlays.Overlays, problem: Any) -> str:
    """One mistake that pydantic found, as a sentence with its file and line."""
    place = tuple(problem["loc"])
    where, name = found.where(place), ".".join(map(str, place)) or "the settings"
    if problem["type"] == "extra_forbidden":
        known = list(_model_at(place[:-1]).model_fields)
        close = difflib.get_close_matches(str(place[-1]), known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}."
        return f"{where}: {name} is no setting; {hint}"
    if problem["type"] == "missing":
        return f"{where}: {name} is missing."
    said = problem["msg"].removeprefix("Value error, ")
    said = said.replace("valid tuple", "list").replace("valid dictionary", "mapping")
    return f"{where}: {name}: {said[:1].lower()}{said[1:]}{_value(problem)}."


def _value(problem: Any) -> str:
    given = problem["input"]
    return f", not {given!r}" if isinstance(given, (str, int, float, bool)) else ""


def _model_at(place: Sequence[str | int]) -> type[BaseModel]:
    """The section that a path leads to."""
    section: type[BaseModel] = Settings
    for part in place:
        if isinstance(part, str):
            section = next(_sections(section.model_fields[part].annotation))
    return section


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _sections(argument)
