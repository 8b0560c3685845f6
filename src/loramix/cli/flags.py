"""Flags that several commands share, as values."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from typer import Option

from loramix.engine import Sampling
from loramix.folders import default_library
from loramix.library import Library

Mixed = Annotated[str, Option("--mix", "-m", metavar="MIX|auto|base", help="What answers.")]
Json = Annotated[bool, Option("--json", help="Print JSON.")]


@dataclass(frozen=True, slots=True)
class Where:
    """Which base, and which adapters."""

    base: Annotated[str, Option(help="Folder, hub id, or pocket.")] = "pocket"
    library: Annotated[Path | None, Option(help="Folder of adapters.")] = None

    @property
    def shelf(self) -> Library:
        return Library(self.library or default_library(self.base))


@dataclass(frozen=True, slots=True)
class Machine:
    """How the base is opened."""

    dtype: Annotated[str, Option(help="auto, float32, bfloat16 or float16.")] = "auto"
    device: Annotated[str, Option(help="auto, cpu, cuda, cuda:1, mps ...")] = "auto"
    revision: Annotated[str | None, Option(help="Branch, tag or commit of a hub id.")] = None
    quantize: Annotated[str, Option(help="none, int8 for half the memory, nf4 for less.")] = "none"


@dataclass(frozen=True, slots=True)
class Picking:
    """How the next token is picked; what is not given comes from the base's own settings."""

    temperature: Annotated[float | None, Option(help="0 is greedy.")] = None
    top_p: Annotated[float | None, Option(help="Keep this much probability.")] = None
    top_k: Annotated[int | None, Option(help="Keep this many tokens.")] = None
    min_p: Annotated[float | None, Option(help="Keep this share of the likeliest.")] = None
    repetition_penalty: Annotated[float | None, Option(help="1 is none.")] = None
    presence_penalty: Annotated[float, Option(help="0 is none.")] = 0.0
    frequency_penalty: Annotated[float, Option(help="0 is none.")] = 0.0
    max_tokens: Annotated[int, Option(help="Longest answer.")] = Sampling().max_tokens
    seed: Annotated[int | None, Option(help="Makes sampling repeatable.")] = None
    stop: Annotated[
        list[str] | None, Option(metavar="TEXT", help="End before this; repeatable.")
    ] = None

    @property
    def sampling(self) -> Sampling:
        return Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            max_tokens=self.max_tokens,
            stop=tuple(self.stop or ()),
            seed=self.seed,
        )


def flags(command: Callable[..., None]) -> Callable[..., None]:
    """The command with each of its dataclass parameters spread over one flag per field.

    typer reads a function's signature, so the signature is what changes: `where: Where` becomes
    `base: ..., library: ...`, and the call puts the value together again.
    """
    parameters = inspect.signature(command, eval_str=True).parameters.values()
    groups: dict[str, Any] = {
        p.name: p.annotation for p in parameters if is_dataclass(p.annotation)
    }

    def call(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in fields(group)})
        command(**given)

    flat = [flag for p in parameters for flag in _spread(p)]
    call.__name__, call.__doc__ = command.__name__, command.__doc__
    call.__signature__ = inspect.Signature(flat)  # type: ignore[attr-defined]
    return call


def _spread(parameter: inspect.Parameter) -> list[inspect.Parameter]:
    """The fields of a dataclass parameter, or the parameter; all keyword-only, in any order."""
    group = parameter.annotation
    if not is_dataclass(group):
        return [parameter.replace(kind=parameter.KEYWORD_ONLY)]
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name, parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in fields(group)
    ]
