"""What each tensor name of each LoRA layout means: which layer, which part of its update.

    PEFT      base_model.model.L.lora_A.weight [R, D]       L.lora_B.weight [O, R]
              L.lora_magnitude_vector [O] for DoRA; an unstripped state dict says L.lora_A.default
    loralib   L.lora_A [R, D]                               L.lora_B [O, R]
    minLoRA   L.parametrizations.weight.0.lora_A [R, D]     ...lora_B [O, R]
    MLX       L.lora_a [D, R]                               L.lora_b [R, O]        L.m [O] for DoRA

A `Conv1D` of GPT-2 stores its own weight as [D, O], but PEFT keeps the factors of its update in the
same orientation as everywhere else, so `fan_in_fan_out` needs no care here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from loramix.errors import FormatError

Layout = Literal["peft", "minlora", "mlx"]
Part = Literal["a", "b", "magnitude"]

_WRAPPED = re.compile(
    r"(?:(?:module|_orig_mod|_forward_module)\.)*(?:(?:model\.)?base_model\.model\.)?"
)
_LAYOUTS: tuple[tuple[Layout, re.Pattern[str]], ...] = (
    ("minlora", re.compile(r"(?P<layer>.+)\.parametrizations\.weight\.0\.lora_(?P<part>[AB])")),
    (
        "peft",
        re.compile(
            r"(?P<layer>.+)\.lora_(?P<part>[AB]|magnitude_vector)"
            r"(?:\.(?!weight$|bias$)(?P<adapter>[^.]+))?(?:\.weight)?"
        ),
    ),
    ("mlx", re.compile(r"(?P<layer>.+)\.(?:lora_(?P<part>[ab])|(?P<m>m))")),
)
_PARTS: Mapping[str, Part] = {
    "A": "a",
    "B": "b",
    "a": "a",
    "b": "b",
    "m": "magnitude",
    "magnitude_vector": "magnitude",
}
_REFUSED = (  # of the update itself, so leaving it out would half apply the adapter
    (re.compile(r"lora_embedding_[AB]"), "LoRA on an embedding"),
    (re.compile(r"(embed_tokens|wte|word_embeddings)\..*lora_[aAbB]"), "LoRA on an embedding"),
    (re.compile(r"lora_B(\.\w+)?\.bias$"), "a bias inside an update"),
    (re.compile(r"lora_E$|ranknum$"), "an AdaLoRA"),
    (re.compile(r"lora_diag"), "a KaSA"),
    (re.compile(r"lora_[ab]_(scales|biases)$"), "quantised MLX factors"),
    (re.compile(r"parametrizations\.(?!weight\.0\.|weight\.original)"), "a second parametrization"),
    (re.compile(r"^prompt_embeddings"), "prompt tuning"),
    (re.compile(r"lora_(up|down)\.|hada_w|lokr_w|vera_lambda|oft_r"), "another kind of adapter"),
)


@dataclass(frozen=True, slots=True)
class Assorted:
    """Tensors by layer and part, and the names of those that are no part of any update."""

    layout: Layout
    layers: dict[str, dict[Part, Tensor]]
    strays: tuple[str, ...]


def assort(tensors: Mapping[str, Tensor], where: str) -> Assorted:
    """Tell the parts of updates from everything else. FormatError if there is no update at all, or
    if parts of one are of a kind that cannot be applied.
    """
    for pattern, what in _REFUSED:
        if found := next((name for name in sorted(tensors) if pattern.search(name)), None):
            raise FormatError(
                f"{where} holds {what} ({found}), which cannot be applied exactly; use an adapter "
                f"of linear layers trained as plain LoRA."
            )
    layers: dict[str, dict[Part, Tensor]] = {}
    layouts: set[Layout] = set()
    adapters: set[str] = set()
    strays: list[str] = []
    for key, tensor in sorted(tensors.items()):
        name = _parse(key)
        if name is None or (name.needs and name.needs not in tensors):
            strays.append(key)
            continue
        if name.part in layers.setdefault(name.layer, {}):
            raise FormatError(f"{where} holds two updates of {name.layer}; expected one.")
        layers[name.layer][name.part] = tensor
        layouts.add(name.layout)
        adapters.add(name.adapter)
    _check_one(layouts, adapters, strays, where)
    return Assorted(layouts.pop(), layers, tuple(strays))


@dataclass(frozen=True, slots=True)
class _Name:
    layout: Layout
    layer: str
    part: Part
    adapter: str  # PEFT's name for it, in a state dict that was not stripped of it
    needs: str  # the tensor without which this one means something else


def _parse(key: str) -> _Name | None:
    """What a tensor's name means; None if it is not part of an update."""
    wrapped = _WRAPPED.match(key)
    bare = key[wrapped.end() :] if wrapped else key
    for layout, pattern in _LAYOUTS:
        if found := pattern.fullmatch(bare):
            fields = found.groupdict()
            needs = f"{fields['layer']}.lora_a" if fields.get("m") else ""
            part = _PARTS[fields["part"] or "m"]
            return _Name(layout, fields["layer"], part, fields.get("adapter") or "", needs)
    return None


def _check_one(
    layouts: Iterable[Layout], adapters: Iterable[str], strays: list[str], where: str
) -> None:
    """One layout, one adapter, at least one update."""
    layouts, adapters = sorted(layouts), sorted(adapters)
    if not layouts:
        raise FormatError(
            f"{where} holds no LoRA tensors but {summary(strays)}; give the adapter's own file."
        )
    if len(layouts) > 1:
        raise FormatError(f"{where} mixes the layouts {' and '.join(layouts)}; expected one.")
    if len(adapters) > 1:
        raise FormatError(
            f"{where} holds several adapters ({', '.join(adapters)}); save one of them alone."
        )


def summary(names: Iterable[str]) -> str:
    """A few of many names, and how many there are."""
    names = list(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (", ".join(names[:3]) or "nothing") + more
