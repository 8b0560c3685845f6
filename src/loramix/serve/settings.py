"""`loramix.yaml`: what a server serves and how. Every key is honoured or refused, none is ignored.

Unknown keys are errors that say the file, the line and the nearest name. What the settings name is
looked at by `problems`, and opened by `open_service` (opening.py).
"""

from __future__ import annotations

import difflib
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from loramix.errors import MixSyntaxError, SettingsError
from loramix.library import Library
from loramix.lm import ROUTER
from loramix.mix import Mix, check_name
from loramix.route import Router
from loramix.routers import (
    fitted_router,
    fixed_router,
    nearest_router,
    rules_router,
    spectral_router,
)
from loramix.serve import overlays
from loramix.serve.limits import Limits
from loramix.serve.shelf import working_library

if TYPE_CHECKING:
    from loramix.base import Base

Precision = Literal["auto", "float32", "bfloat16", "float16"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class BaseSettings(Section):
    """The base; `base: pocket` is short for `base: {model: pocket}`."""

    model: str = "pocket"
    dtype: Precision = "auto"
    device: str = "auto"
    revision: str | None = None
    quantize: Literal["none", "int8", "nf4"] = "none"


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

    kind: Literal["auto", "none", "fixed", "rules", "nearest", "spectral"] = "auto"
    mix: str | None = None  # of fixed
    file: str | None = None  # of rules
    thresholds: dict[str, float] = {}  # of auto: least in-scope scores, for some adapters
    fade: bool | None = None  # of auto: weights shrink with P(none); as it was fitted
    top: int | None = Field(default=None, ge=1)  # of auto: most adapters in a mix; as fitted

    @model_validator(mode="after")
    def _belongs(self) -> Self:
        for name, value, kind in (("mix", self.mix, "fixed"), ("file", self.file, "rules")):
            if (value is None) == (self.kind == kind):
                raise ValueError(f"kind {kind} needs {name}, and no other kind has it")
        if self.kind != "auto" and self.changes:
            raise ValueError(f"only kind auto has {next(iter(self.changes))}")
        return self

    @property
    def changes(self) -> dict[str, Any]:
        """What is to replace the fitted router's own settings."""
        given = {"thresholds": self.thresholds or None, "fades": self.fade, "top": self.top}
        return {name: value for name, value in given.items() if value is not None}

    def opened(self, library: Library) -> bool | Router | Callable[[Base], Router]:
        """As `lm.open` takes it. Raises MixSyntaxError, RouteError."""
        if self.mix is not None:
            return fixed_router(self.mix)
        if self.file is not None:
            return rules_router(self.file)
        if self.kind == "nearest":
            return nearest_router(library.folder / ROUTER)
        if self.kind == "spectral":
            return partial(spectral_router, library)
        if self.changes:
            return self.reopened(library)
        return self.kind == "auto"

    def reopened(self, library: Library) -> Router:
        """The library's fitted router as it is now, under these settings. Raises RouteError."""
        return fitted_router(library, **self.changes)


class EngineSettings(Section):
    """Of the running batch; see `LocalEngine`. What is not said is its own default."""

    max_batch: int | None = Field(default=None, ge=1)
    max_queue: int | None = Field(default=None, ge=1)
    context: int | None = Field(default=None, ge=2)  # tokens of a prompt and its answer
    step_tokens: int | None = Field(default=None, ge=1)
    kv_bytes: int | None = Field(default=None, ge=1)
    adapter_bytes: int | None = Field(default=None, ge=1)
    num_threads: int | None = Field(default=None, ge=1)
    reuse: bool | None = None  # of computed prompts, by requests of the same mix
    tiles: bool | None = None  # products of few rows by a C function

    def options(self) -> dict[str, Any]:
        return self.model_dump(exclude_none=True)


class LimitSettings(Section):
    """See `Limits`; what is not said is its default."""

    body_bytes: int | None = Field(default=None, ge=1)
    upload_bytes: int | None = Field(default=None, ge=1)
    dataset_bytes: int | None = Field(default=None, ge=1)
    dataset_rows: int | None = Field(default=None, ge=1)
    answer_tokens: int | None = Field(default=None, ge=1)
    n: int | None = Field(default=None, ge=1, le=128)
    timeout_s: float | None = Field(default=None, gt=0)
    task_days: float | None = Field(default=None, ge=0)
    shutdown_s: float | None = Field(default=None, ge=0)

    def limits(self) -> Limits:
        return replace(Limits(), **self.model_dump(exclude_none=True))


class KeySettings(Section):
    """A key that there is from the start on; see `Keys.add`."""

    name: str
    secret: str  # as `loramix keys secret` prints it
    role: Literal["user", "admin"] = "user"
    adapters: tuple[str, ...] | None = Field(None, strict=False)  # that it may use
    requests_per_minute: int | None = Field(default=None, ge=1)
    tokens_per_minute: int | None = Field(default=None, ge=1)

    @field_validator("secret")
    @classmethod
    def _secret(cls, secret: str) -> str:
        from loramix.store.keys import is_secret

        if not is_secret(secret):
            raise ValueError("expected what `loramix keys secret` prints")
        return secret


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
    page: bool = True  # the chat page at /
    roots: tuple[str, ...] = Field((), strict=False)  # folders that adapters may be loaded from
    keys: tuple[KeySettings, ...] = Field((), strict=False)  # beside those of the database
    cors: tuple[str, ...] = Field((), strict=False)  # origins whose pages may call
    database: str | None = None  # URL; $LORAMIX_DATABASE, or a file of yours
    training: str | None = None  # folder of datasets and jobs; beside your library
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
        keys = [key.name for key in self.keys]
        for kind, called in (("adapters", names), ("keys", keys)):
            for name in called:
                if called.count(name) > 1:
                    raise ValueError(f"two {kind} are called {name!r}; rename one")
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

    @cached_property
    def shelf(self) -> Library:
        return Library(Path(self.library) if self.library else working_library(self.model.model))

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
    is_told = isinstance(given, (str, int, float, bool)) and "secret" not in problem["loc"]
    return f", not {given!r}" if is_told else ""


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
