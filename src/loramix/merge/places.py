"""Which rows of which stored tensor each layer's update belongs to.

A layer is called by the module's name in transformers; a file may use older prefixes, hold q, k and
v as one matrix, or store a matrix transposed. Every update finds exactly one place, or nothing is
merged.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from loramix.adapter import Adapter
from loramix.errors import BaseMismatch
from loramix.merge.stored import Stored, StoredBase

_PREFIX = re.compile(r"^(?:(?:model|transformer|language_model|text_model)\.)+")
# Architectures whose c_* layers are Conv1D: the weight is stored [D, O].
_TRANSPOSED = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}
_FUSED = {  # a part, the tensor that holds it on disk, and the parts of that tensor in order
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}


@dataclass(frozen=True, slots=True)
class Place:
    """Rows `start` to `stop` of a stored matrix, or all of one that is stored transposed."""

    layer: str
    stored: Stored
    start: int
    stop: int
    transposed: bool = False


def places(adapters: Iterable[Adapter], base: StoredBase) -> dict[str, Place]:
    """The place of every layer that an adapter updates; BaseMismatch naming those without one."""
    shapes: dict[str, tuple[tuple[int, int], str]] = {}
    for adapter in adapters:
        for layer, pair in adapter.pairs.items():
            shapes.setdefault(layer, ((pair.b.shape[0], pair.a.shape[1]), adapter.name))
    tensors = base.tensors
    bare: dict[str, list[Stored]] = {}
    for tensor in tensors.values():
        bare.setdefault(_PREFIX.sub("", tensor.name), []).append(tensor)
    found = {
        layer: _place(layer, shape, base, tensors, bare) for layer, (shape, _) in shapes.items()
    }
    if base.text_config.get("tie_word_embeddings"):
        found |= {layer: None for layer in found if layer.endswith("lm_head")}
    strays = sorted(layer for layer, place in found.items() if place is None)
    if strays:
        raise BaseMismatch(_no_place(strays, len(shapes), shapes[strays[0]][1], base))
    placed = {layer: place for layer, place in found.items() if place}
    for layer, place in placed.items():
        _check_shape(place, shapes[layer], base)
    _check_apart(placed.values())
    return placed


def _place(
    layer: str,
    shape: tuple[int, int],
    base: StoredBase,
    tensors: Mapping[str, Stored],
    bare: Mapping[str, list[Stored]],
) -> Place | None:
    """None if the files have no such tensor, or several that it could be."""
    here = _lookup(layer, tensors, bare)
    if here is not None:
        kind = str(base.text_config.get("model_type", ""))
        transposed = kind in _TRANSPOSED and layer.rpartition(".")[2].startswith("c_")
        return Place(layer, here, 0, here.shape[0], transposed)
    parent, _, part = layer.rpartition(".")
    fused = _FUSED.get(part) and _lookup(f"{parent}.{_FUSED[part]}", tensors, bare)
    if not fused:
        return None
    start = _offset(part, shape[0], fused, base)
    return None if start is None else Place(layer, fused, start, start + shape[0])


def _lookup(
    layer: str, tensors: Mapping[str, Stored], bare: Mapping[str, list[Stored]]
) -> Stored | None:
    exact = tensors.get(f"{layer}.weight")
    alike = bare.get(_PREFIX.sub("", f"{layer}.weight"), [])
    return exact or (alike[0] if len(alike) == 1 else None)


def _offset(part: str, rows: int, fused: Stored, base: StoredBase) -> int | None:
    """Where a part begins in [q; k; v] or [gate; up]; None if the sizes do not add up."""
    total = fused.shape[0]
    if part in ("gate_proj", "up_proj"):
        return None if 2 * rows != total else rows * (part == "up_proj")
    config = base.text_config
    heads = int(config.get("num_attention_heads") or 0)
    groups = int(config.get("num_key_value_heads") or heads)
    if not heads or total % (heads + 2 * groups):
        return None
    size = total // (heads + 2 * groups)
    begins = {"q_proj": (0, heads), "k_proj": (heads, groups), "v_proj": (heads + groups, groups)}
    begin, count = begins[part]
    return begin * size if rows == count * size else None


def _check_shape(place: Place, wanted: tuple[tuple[int, int], str], base: StoredBase) -> None:
    (out, width), adapter = wanted
    expected = (width, out) if place.transposed else (place.stop - place.start, width)
    side = place.stored.shape
    fits = len(side) == 2 and (side if place.transposed else (expected[0], side[1])) == expected
    if not fits or place.stop - place.start != (side[0] if place.transposed else out):
        raise BaseMismatch(
            f"{adapter!r} has an update of shape {[out, width]} for {place.layer}, which is "
            f"{list(side)} in {base.folder}; it was trained for another base: merge it there."
        )
    place.stored.dtype  # noqa: B018  refuses what is quantised


def _check_apart(placed: Iterable[Place]) -> None:
    """BaseMismatch if two layers own the same rows: one of their updates would be lost."""
    last: Place | None = None
    for place in sorted(placed, key=lambda place: (place.stored.name, place.start)):
        if last and last.stored.name == place.stored.name and place.start < last.stop:
            raise BaseMismatch(
                f"The adapters call the same rows of {place.stored.name} {last.layer} and "
                f"{place.layer}; merge adapters that were trained on one form of the base."
            )
        last = place


def _no_place(strays: list[str], count: int, adapter: str, base: StoredBase) -> str:
    first = strays[0]
    text = f"{len(strays)} of {count} updates find no tensor in {base.folder} (first: {first}"
    if first.endswith("lm_head"):
        return (
            f"{text}): its output layer is the embedding itself, so a folded update would change "
            f"the inputs too; untie the base first, or serve the adapter on top of it."
        )
    if "experts" in first:
        return (
            f"{text}): its experts are stored as one tensor, whose order of factors differs "
            f"between versions of PEFT; merge an adapter without experts, or serve this one on top."
        )
    return f"{text}, of {adapter!r}); it was trained for another base: merge it there."
