"""Which mix a request names. There are many ways to say it; two that disagree are a 400.

model     "base" or the base's id, "sql", "pocket:sql", "sql:0.4+math:0.6", "auto"
mix       {"sql": 0.4, "math": 0.6}, or its name
lora      llama.cpp's [{"id": 0, "scale": 0.4}], or by name
adapter_id, merged_adapters      LoRAX's
"""

from __future__ import annotations

import math

from loramix.errors import BadRequest, MixSyntaxError, UnknownAdapter
from loramix.mix import Mix
from loramix.serve.answering import MixOrAuto
from loramix.serve.service import Caller, Service
from loramix.serve.wire import Asked, LoraScale


def named_mix(asked: Asked, service: Service, caller: Caller) -> MixOrAuto:
    """The mix of a request, "auto", or what the server answers with if it names none.

    `model` may name the base beside another field, as the model that the mix is over.
    """
    said = dict(_said(asked, service))
    model = model_mix(asked.model, service, caller) if asked.model else None
    if model is not None and (model or not said):
        said["model"] = model
    if len(set(said.values())) > 1:
        ways = ", ".join(f"{field} says {str(mix)!r}" for field, mix in said.items())
        raise BadRequest(f"The request names different mixes: {ways}; name one.")
    if said:
        return next(iter(said.values()))
    return default_mix(service, caller)


def default_mix(service: Service, caller: Caller) -> MixOrAuto:
    """What a request gets that names none.

    BadRequest if some of it is not on offer; which is not said, as it may be another key's.
    """
    try:
        return model_mix(service.default_mix, service, caller)
    except UnknownAdapter as error:
        raise BadRequest(
            "The request names no mix, and an adapter of the default one is not on offer; name a "
            "mix as model, or have an admin set another default."
        ) from error


def model_mix(model: str, service: Service, caller: Caller) -> MixOrAuto:
    """The mix that a model's name stands for. UnknownAdapter if it stands for nothing."""
    base = service.lm.engine.base_id
    if model == "auto":
        return "auto"
    if model in (base, "base"):
        return Mix()
    for prefix in (f"{base}:", "base:"):
        if model.startswith(prefix):
            model = model.removeprefix(prefix)
    try:
        mix = Mix.parse(model)
    except MixSyntaxError:
        if ":" in model or "+" in model:
            raise
        raise UnknownAdapter(model[:80], _names(service, caller)) from None
    caller.require(mix, service)
    return mix


def scaled(scales: list[LoraScale], service: Service) -> Mix:
    """llama.cpp's list as a mix."""
    weights: dict[str, float] = {}
    for scale in scales:
        name = _of_scale(scale, service)
        if name in weights:
            raise BadRequest(f"lora names {name!r} twice; add its scales.")
        weights[name] = scale.scale
    return Mix(weights)


def _said(asked: Asked, service: Service) -> list[tuple[str, MixOrAuto]]:
    """The mixes that fields other than `model` name."""
    said: list[tuple[str, MixOrAuto]] = []
    if isinstance(asked.mix, str):
        said.append(("mix", "auto" if asked.mix == "auto" else Mix.parse(asked.mix)))
    elif asked.mix is not None:
        said.append(("mix", Mix(asked.mix)))
    if asked.lora is not None:
        said.append(("lora", scaled(asked.lora, service)))
    if asked.adapter_id is not None:
        said.append(("adapter_id", Mix({asked.adapter_id: 1}) if asked.adapter_id else Mix()))
    if merged := asked.merged_adapters:
        if len(merged.ids) != len(merged.weights) or len(set(merged.ids)) < len(merged.ids):
            raise BadRequest("merged_adapters needs one weight for each id, and each id once.")
        said.append(("merged_adapters", Mix(dict(zip(merged.ids, merged.weights, strict=True)))))
    if asked.adapter_source and not (asked.adapter_id or asked.merged_adapters):
        raise BadRequest("adapter_source is said without adapter_id or merged_adapters; name one.")
    return said


def _of_scale(scale: LoraScale, service: Service) -> str:
    if (scale.id is None) == (scale.name is None):
        raise BadRequest("Each entry of lora needs an id or a name, not both.")
    if not math.isfinite(scale.scale):
        raise BadRequest(f"scale is {scale.scale}; expected a finite number.")
    if scale.name is not None:
        return scale.name
    assert scale.id is not None
    numbers = service.numbers()
    if scale.id not in numbers:
        raise BadRequest(f"lora names id {scale.id}, which no adapter has; see /lora-adapters.")
    return numbers[scale.id]


def _names(service: Service, caller: Caller) -> list[str]:
    return [service.lm.engine.base_id, "auto", *caller.names(service)]
