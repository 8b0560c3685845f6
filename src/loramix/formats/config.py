"""What an adapter_config.json says: the scale of each update, and the layers it should touch.

Two layouts share the file name. PEFT's LoraConfig scales an update by alpha / r, by alpha / sqrt(r)
with rsLoRA (https://arxiv.org/abs/2312.03732), both per layer through patterns; mlx-lm's
`lora_parameters` hold a `scale` that multiplies directly. Everything a LoraConfig of PEFT 0.21 can
hold is honoured, harmless, or refused by name; a field nobody here knows is refused as well,
because it may change the mathematics.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loramix.errors import FormatError
from loramix.formats.fields import Fields

HONOURED = {
    *("peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "init_lora_weights"),
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "use_dora", "enable_lora"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
}
HARMLESS = {  # how it was started, trained and saved; VeLoRA changes the backward pass alone
    *("peft_version", "revision", "inference_mode", "lora_dropout", "fan_in_fan_out"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config"),
    *("megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying"),
    *("merge_weights",),
}
EXTRAS = {  # whole tensors trained beside the updates; `lora_only` leaves them out
    "modules_to_save": "it also trained whole modules",
    "bias": "it also trained biases of the base",
    "trainable_token_indices": "it also trained rows of the embedding",
}
REFUSED = {
    "lora_bias": "its updates carry a bias",
    "alora_invocation_tokens": "it is an activated LoRA (aLoRA), silent before certain tokens",
    "target_parameters": "it adapts fused expert parameters (MoE)",
    "layer_replication": "it runs layers of the base more than once",
    "use_qalora": "it is a QA-LoRA, which pools the input",
    "use_bdlora": "it is a BD-LoRA, whose factors are block-diagonal",
    "arrow_config": "it routes among other adapters (Arrow)",
    "kasa_config": "it is a KaSA, which changed its base before training",
    "monteclora_config": "it is a MonteCLoRA, which samples its factors",
    "megatron_config": "its layers are split by Megatron",
}
STARTS = frozenset(
    {True, False, None, "gaussian", "eva", "orthogonal", "mica"}
)  # leave the base be
CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
RETRAIN = "use an adapter trained as plain LoRA"


@dataclass(frozen=True, slots=True)
class Settings:
    """How the tensors of one file become updates. Without any config: scale one, any layers."""

    base: str = ""
    rank: int | None = None
    alpha: float | None = None
    factor: float | None = None  # MLX's scale, used as it is
    rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    targets: tuple[str, ...] | str | None = None  # names, a regular expression, or unknown
    excluded: tuple[str, ...] | str = ()
    layers: tuple[int, ...] = ()  # numbers of the layers adapted; none given means all
    layers_pattern: tuple[str, ...] = ()
    dora: bool | None = None  # None: as the tensors say
    enabled: tuple[bool, ...] = ()  # the thirds of a fused projection an old MergedLinear adapts

    def scale(self, layer: str, rank: int, where: str) -> float:
        """What multiplies `b @ a` of this layer. FormatError if the file's rank is another one."""
        expected = _pattern(self.rank_pattern, layer, self.rank)
        if expected not in (None, rank):
            raise FormatError(
                f"{where}: the update of {layer} has rank {rank}, its config says {expected}; the "
                f"two files do not belong together: fetch both again."
            )
        if self.factor is not None:
            return self.factor
        alpha = _pattern(self.alpha_pattern, layer, self.alpha)
        if alpha is None:
            return 1.0
        return float(alpha) / (math.sqrt(rank) if self.rslora else rank)

    def check_layers(self, layers: Iterable[str], where: str) -> None:
        """FormatError unless the updates and the config name the same layers."""
        layers = list(layers)
        strays = [layer for layer in layers if not self.targeted(layer)]
        if strays:
            raise FormatError(
                f"{where}: {len(strays)} of {len(layers)} updates are for layers its config does "
                f"not target (first: {strays[0]}); fetch both files again, they are not a pair."
            )
        targets = self.targets if isinstance(self.targets, tuple) else ()
        names = [name for name in targets if not _matches(self.excluded, name)]
        ends = {end for layer in layers for end in _ends(layer)}
        empty = [name for name in names if name not in ends]
        if empty:
            raise FormatError(
                f"{where}: its config targets {', '.join(sorted(empty))}, but the file has no "
                f"update for them; fetch it again, or take them out of target_modules."
            )

    def targeted(self, layer: str) -> bool:
        """Whether PEFT would adapt this layer: a full name counts whatever its number."""
        if _matches(self.excluded, layer):
            return False
        if self.targets in (None, "all-linear"):
            return True
        if isinstance(self.targets, str) or not self.layers or layer in (self.targets or ()):
            return _matches(self.targets or (), layer)
        return _matches(self.targets or (), layer) and self._number(layer) in self.layers

    def _number(self, layer: str) -> int | None:
        """The layer's number: after one of the patterns, else the first number in its name."""
        for pattern in self.layers_pattern or (r"[^.]*",):
            if found := re.match(rf"(?:^|.*?\.)(?:{pattern})\.(?P<number>\d+)\.", layer):
                return int(found["number"])
        return None


def load_config(file: Path) -> dict[str, Any]:
    """The JSON object in `file`; FormatError for anything else."""
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise FormatError(
            f"{file} does not exist; an adapter's folder needs its config."
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"{file} cannot be read as text: {error}; fetch it again.") from error
    if text.startswith("version https://git-lfs"):
        raise FormatError(f"{file} is a git-LFS pointer, not the file; run `git lfs pull` there.")
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also a number of 5,000 digits
        raise FormatError(f"{file} is not JSON ({error}); fetch it again.") from error
    if not isinstance(config, dict):
        raise FormatError(f"{file} holds a JSON {type(config).__name__}; expected an object.")
    return config


def interpret(config: Mapping[str, Any], where: str, *, lora_only: bool = False) -> Settings:
    """What a config asks for. FormatError, saying what it is, if that is no LoRA we compute."""
    if "lora_parameters" in config or "fine_tune_type" in config:
        return _mlx(config, where)
    if {"model_type", "model_name"} <= config.keys():
        raise FormatError(f"{where}: an AdapterHub adapter, not a LoRA; {RETRAIN}.")
    if "peft_type" not in config and not {"r", "lora_alpha"} <= config.keys():
        raise FormatError(f"{where}: neither a PEFT nor an MLX config (no peft_type); {RETRAIN}.")
    if (kind := config.get("peft_type", "LORA")) not in ("LORA", "lora"):
        raise FormatError(f"{where}: an adapter of type {kind}, not LORA; {RETRAIN}.")
    _refuse_other_tasks(config, where)
    _refuse_other_methods(config, where, lora_only)
    _refuse_unknown(config, where)
    return _peft(config, where)


def _peft(config: Mapping[str, Any], where: str) -> Settings:
    get = Fields(config, where)
    settings = Settings(
        base=_base_name(get.text("base_model_name_or_path")),
        rank=get.count("r", 8),
        alpha=get.number("lora_alpha", 8.0),
        rslora=get.flag("use_rslora"),
        rank_pattern=get.counts("rank_pattern"),
        alpha_pattern=get.numbers("alpha_pattern"),
        targets=get.texts_or_text("target_modules"),
        excluded=get.texts_or_text("exclude_modules") or (),
        layers=get.integers("layers_to_transform"),
        layers_pattern=get.texts("layers_pattern"),
        dora=get.flag("use_dora"),
        enabled=get.flags("enable_lora"),
    )
    regexes = [*settings.rank_pattern, *settings.alpha_pattern, *settings.layers_pattern]
    regexes += [text for text in (settings.targets, settings.excluded) if isinstance(text, str)]
    get.compile(regexes)
    return settings


def _mlx(config: Mapping[str, Any], where: str) -> Settings:
    """mlx-lm: `scale` multiplies directly. All else in the file are arguments of the trainer.

    Until June 2024 it was scale * alpha / rank. Such a file cannot be told from the ones written
    in the three months after, while `lora_layers` was the key, unless it adapts all layers (-1).
    """
    kind = config.get("fine_tune_type", "dora" if config.get("use_dora") else "lora")
    if kind not in ("lora", "dora"):
        raise FormatError(f"{where}: fine_tune_type is {kind!r}, not a LoRA; {RETRAIN}.")
    inner = config.get("lora_parameters")
    if not isinstance(inner, Mapping) or not {"rank", "scale"} <= inner.keys():
        raise FormatError(f"{where}: lora_parameters need a rank and a scale; fetch it again.")
    if unknown := inner.keys() - {"rank", "scale", "alpha", "dropout", "keys"}:
        raise FormatError(
            f"{where}: unknown lora_parameters {', '.join(sorted(unknown))}; {RETRAIN}."
        )
    get = Fields(inner, where)
    rank, alpha = get.count("rank", 8), get.number("alpha", 0.0)
    if config.get("lora_layers", -1) != -1 and "alpha" in inner and alpha != rank:
        raise FormatError(
            f"{where}: an mlx-lm file of 2024 with alpha {alpha:g} beside rank {rank}, which meant "
            f"scale * alpha / rank before June and nothing after; set the scale and delete alpha."
        )
    targets = get.texts("keys") or None
    base = _base_name(Fields(config, where).text("model"))
    return Settings(
        base, rank, factor=get.number("scale", 1.0), targets=targets, dora=kind == "dora"
    )


def _refuse_other_tasks(config: Mapping[str, Any], where: str) -> None:
    task = config.get("task_type")
    mapping = config.get("auto_mapping")
    model = mapping.get("base_model_class") if isinstance(mapping, Mapping) else None
    if isinstance(model, str) and re.search(r"For(?!CausalLM|ConditionalGeneration)[A-Z]", model):
        task = model
    if task not in (None, "", "CAUSAL_LM"):
        raise FormatError(
            f"{where}: trained for {task}, not for a causal language model; {RETRAIN}."
        )


def _refuse_other_methods(config: Mapping[str, Any], where: str, lora_only: bool) -> None:
    for key, why in REFUSED.items():
        if config.get(key):
            raise FormatError(f"{where}: {key} is set: {why}; {RETRAIN}.")
    for key, why in EXTRAS.items():
        value = config.get(key)
        if value and value != "none" and not lora_only:
            shown = ", ".join(map(str, value)) if isinstance(value, list) else value
            raise FormatError(
                f"{where}: {key} is {shown}: {why}, which a LoRA cannot hold; read it with "
                f"lora_only to leave that out, or {RETRAIN}."
            )
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(CHANGED_BASE):
        raise FormatError(
            f"{where}: init_lora_weights is {start!r}, which changed the base before training; "
            f"convert it with PEFT's path_initial_model_for_weight_conversion, or {RETRAIN}."
        )
    if not isinstance(start, bool | str | None) or start not in STARTS:
        raise FormatError(f"{where}: unknown init_lora_weights {start!r}; {RETRAIN}.")


def _refuse_unknown(config: Mapping[str, Any], where: str) -> None:
    known = HONOURED | HARMLESS | EXTRAS.keys() | REFUSED.keys()
    for key, value in config.items():
        if key not in known and value not in (None, False, "", [], {}):
            close = difflib.get_close_matches(key, known, n=1)
            hint = (
                f"if it is {close[0]!r}, rename it" if close else "if it changes nothing, delete it"
            )
            raise FormatError(
                f"{where}: unknown field {key!r}, which may change the result; {hint}."
            )


def _pattern(patterns: Mapping[str, Any], layer: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the end of the layer's name."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            return value
    return default


def _matches(rule: tuple[str, ...] | str, layer: str) -> bool:
    if isinstance(rule, str):
        return re.fullmatch(rule, layer) is not None
    return not _ends(layer).isdisjoint(rule)


def _ends(layer: str) -> set[str]:
    """The names that mean a layer: its own, and what comes after each of its dots."""
    parts = layer.split(".")
    return {".".join(parts[n:]) for n in range(len(parts))}


def _base_name(base: str) -> str:
    """A hub id as it is; of a path on somebody's machine, the last part."""
    is_path = base.startswith(("/", ".", "~")) or "\\" in base or base.count("/") > 1
    return re.split(r"[/\\]", base.rstrip("/\\"))[-1] if is_path else base
