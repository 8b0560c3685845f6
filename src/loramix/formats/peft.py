"""LoRA files as adapters and back: the boundary at which alpha, layouts and key prefixes end.

    dW = scale * B A        read() multiplies the scale into B, write() says alpha = r

What is read: PEFT folders, single files (with their config beside them, or with the rank of their
tensors and alpha = r, which is scale one), checkpoints around a LoRA, minLoRA and MLX files. What
is not exactly a LoRA is refused by name. Tensors keep their precision, except where the scaled B
does not fit it: then that update is kept in float32.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from loramix.adapter import Adapter, Card
from loramix.errors import FormatError
from loramix.formats.aside import aside
from loramix.formats.card import read_card
from loramix.formats.config import Settings, interpret, load_config
from loramix.formats.folder import CARD, CONFIG, PICKLED, SAFE, WEIGHTS, find_weights
from loramix.formats.keys import Assorted, Layout, Part, assort, summary
from loramix.formats.weights import open_weights
from loramix.lora import Pair
from loramix.mix import check_name, slug
from loramix.threads import single_threaded

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MINLORA_ALPHA = 1.0  # its default, and its files do not say


def read(
    path: str | Path,
    *,
    name: str | None = None,
    allow_pickle: bool = False,
    lora_only: bool = False,
    report: Callable[[str], None] | None = None,
) -> Adapter:
    """The adapter in a folder or file; `name` is the folder's or file's own unless given.

    `lora_only` leaves out whatever is not LoRA (full embeddings, an optimizer, a wrapper);
    `report` is told what was left out and what was assumed. Pickles are only opened with
    `allow_pickle`. Raises FormatError, MixSyntaxError for a name no mix can hold.
    """
    path = Path(path)
    if not path.exists():
        raise FormatError(
            f"{path} does not exist; give a folder or file of an adapter, or a hub id."
        )
    tell = report or (lambda line: None)
    folder = path if path.is_dir() else path.parent
    settings = _settings(path, lora_only)
    file = find_weights(path) if path.is_dir() else path
    opened = open_weights(file, allow_pickle=allow_pickle)
    assorted = assort(opened.tensors, str(file))
    _leave_out((*opened.rest, *assorted.strays), lora_only, str(file), tell)
    with single_threaded():
        pairs = _pairs(assorted, settings, str(file), tell)
    name = check_name(name or slug(_own_name(path)))
    return Adapter(name, pairs, digest(pairs), _card(folder, name, settings))


def write(adapter: Adapter, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
    """Write a PEFT folder with alpha = r; a mix of ranks goes into rank_pattern and alpha_pattern.

    Reading it back and writing again gives the same bytes. The folder appears whole or not at all.
    Raises AdapterError if it exists, FormatError if some updates are DoRA and some are not.
    """
    if len({pair.magnitude is None for pair in adapter.pairs.values()}) > 1:
        raise FormatError(
            f"{adapter.name!r} has DoRA updates beside plain ones, which a PEFT file cannot say; "
            f"turn the DoRA into a plain LoRA first (loramix convert --base BASE --rank R)."
        )
    tensors = {}
    for layer, pair in adapter.pairs.items():
        for part, tensor in _parts(pair if dtype is None else pair.to(dtype)):
            key = "lora_magnitude_vector" if part == "magnitude" else f"lora_{part.upper()}.weight"
            own = tensor.detach().cpu().clone()  # layers may share a tensor, a file may not
            tensors[f"base_model.model.{layer}.{key}"] = own.contiguous()
    with aside(Path(folder)) as place:
        place.mkdir()
        try:
            save_file(tensors, place / WEIGHTS, metadata={"format": "pt"})
        except SafetensorError as error:  # how it reports a full disk, among others
            raise OSError(str(error)) from error
        text = json.dumps(_config(adapter), indent=2, sort_keys=True)
        (place / CONFIG).write_text(text + "\n", encoding="utf-8")


def digest(pairs: Mapping[str, Pair]) -> str:
    """sha256 of all that acts: the names, shapes, precisions and bytes of the scaled tensors."""
    state = hashlib.sha256()
    for layer, pair in sorted(pairs.items()):
        for part, tensor in _parts(pair):
            state.update(f"{layer} {part} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            state.update(raw.numpy().data)
    return state.hexdigest()


def scale_of(path: str | Path, adapter: Adapter) -> float:
    """What its config multiplies the factors of an adapter's file by, which is in its pairs.

    Raises FormatError if that differs between layers.
    """
    settings = _settings(Path(path), lora_only=False) or Settings()
    found = {settings.scale(n, pair.rank, str(path)) for n, pair in adapter.pairs.items()}
    if len(found) > 1:
        listed = ", ".join(f"{scale:g}" for scale in sorted(found))
        raise FormatError(
            f"The layers of {path} have scales of {listed}; expected one: read it into the "
            f"library first (loramix adapters add), which keeps the scales in the factors."
        )
    return found.pop()


def _settings(path: Path, lora_only: bool) -> Settings | None:
    """From the config in the folder, or beside the file; None for a file that has none."""
    file = (path if path.is_dir() else path.parent) / CONFIG
    if path.is_dir() and not file.exists():
        find_weights(path)
        raise FormatError(
            f"{path} has no {CONFIG}, so the scale of its updates is unknown; add it, or give the "
            f"file of weights itself to read it at scale one (alpha = r)."
        )
    if not file.exists():
        return None
    return interpret(load_config(file), str(file), lora_only=lora_only)


def _leave_out(
    strays: tuple[str, ...], lora_only: bool, where: str, tell: Callable[[str], None]
) -> None:
    if strays and not lora_only:
        raise FormatError(
            f"{where} holds more than LoRA: {summary(strays)}; read it with lora_only to leave "
            f"that out, or save the adapter alone."
        )
    if strays:
        tell(f"Left out of {where}: {', '.join(strays)}.")


def _pairs(
    assorted: Assorted, settings: Settings | None, where: str, tell: Callable[[str], None]
) -> dict[str, Pair]:
    if settings is None:
        settings = _without_config(assorted.layout, where, tell)
    settings.check_layers(assorted.layers, where)
    pairs = {
        layer: _pair(layer, parts, assorted.layout, settings, where)
        for layer, parts in assorted.layers.items()
    }
    if all(
        pair.magnitude is None and not (pair.b.any() and pair.a.any()) for pair in pairs.values()
    ):
        raise FormatError(
            f"{where} changes nothing: every update is zero, as in an adapter that was never "
            f"trained; train it, or fetch the trained one."
        )
    return pairs


def _without_config(layout: Layout, where: str, tell: Callable[[str], None]) -> Settings:
    if layout == "mlx":
        raise FormatError(f"{where}: an MLX file has its scale in {CONFIG}; put that beside it.")
    if layout == "minlora":
        tell(f"{where} does not say its alpha; minLoRA's default of {MINLORA_ALPHA:g} is assumed.")
        return Settings(alpha=MINLORA_ALPHA)
    tell(f"No {CONFIG} beside {where}: alpha = r is assumed, which is scale one.")
    return Settings()


def _pair(
    layer: str, parts: Mapping[Part, Tensor], layout: Layout, settings: Settings, where: str
) -> Pair:
    """One update from its tensors, with the scale multiplied into `b`."""
    if missing := {"a", "b"} - parts.keys():
        raise FormatError(
            f"{where}: the update of {layer} lacks its {missing.pop().upper()}; fetch it again."
        )
    if settings.dora is not None and settings.dora != ("magnitude" in parts):
        raise FormatError(
            f"{where}: use_dora is {str(settings.dora).lower()} in its config, but {layer} has "
            f"{'no' if settings.dora else 'a'} magnitude; fetch both files again."
        )
    for part, tensor in parts.items():
        _check_values(tensor, f"{where}: {part.upper()} of {layer}")
    a, b = parts["a"], parts["b"]
    if layout == "mlx":
        a, b = a.T, b.T
    rank = len(a)
    if settings.enabled:
        rank, b = _merged_linear(a, b, settings.enabled, f"{where}: {layer}")
    magnitude = parts["magnitude"].flatten() if "magnitude" in parts else None
    _check_shapes(a, b, magnitude, f"{where}: {layer}")
    return _scaled(Pair(a.contiguous(), b, magnitude), settings.scale(layer, rank, where), where)


def _merged_linear(
    a: Tensor, b: Tensor, enabled: tuple[bool, ...], what: str
) -> tuple[int, Tensor]:
    """The `b` [O, R] of loralib's MergedLinear, which adapts some parts of a fused projection.

    Its own is a grouped convolution [O', r, 1]: the outputs of group g see only the r rows of `a`
    of group g, and O' are the outputs of the enabled parts. Returns r and `b` with zeros elsewhere.
    """
    if not any(enabled) or b.dim() != 3 or a.dim() != 2 or len(a) % b.shape[1]:
        shapes = f"A {list(a.shape)} and B {list(b.shape)}"
        raise FormatError(f"{what} has {shapes}; expected those of enable_lora; fetch it again.")
    rank = b.shape[1]
    groups = len(a) // rank
    if len(b) % groups or len(b) % sum(enabled):
        raise FormatError(
            f"{what}: {len(b)} outputs do not divide into its groups; fetch it again."
        )
    blocks = b.new_zeros(len(b), len(a))  # [O', R]
    for g, (rows, block) in enumerate(zip(blocks.chunk(groups), b.chunk(groups), strict=True)):
        rows[:, g * rank : (g + 1) * rank] = block[:, :, 0]
    adapted = torch.tensor(enabled).repeat_interleave(len(b) // sum(enabled))
    full = b.new_zeros(len(adapted), len(a))
    full[adapted] = blocks
    return rank, full


def _check_values(tensor: Tensor, what: str) -> None:
    if tensor.dtype not in DTYPES:
        raise FormatError(f"{what} is {tensor.dtype}; expected a float of 16, 32 or 64 bits.")
    if not _is_finite(tensor):
        raise FormatError(f"{what} holds NaN or infinity; its training diverged: use another one.")


def _check_shapes(a: Tensor, b: Tensor, magnitude: Tensor | None, what: str) -> None:
    shapes = f"A {list(a.shape)} and B {list(b.shape)}"
    if a.dim() == 2 and b.dim() == 2 and a.shape[1] == len(b) and len(a) != b.shape[1]:
        raise FormatError(
            f"{what} has {shapes}, swapped as for an embedding; use linear layers only."
        )
    if a.dim() != 2 or b.dim() != 2 or not a.numel() or len(a) != b.shape[1]:
        raise FormatError(f"{what} has {shapes}; expected [R, D] and [O, R]; fetch it again.")
    if magnitude is not None and len(magnitude) != len(b):
        raise FormatError(f"{what} has {len(magnitude)} magnitudes for {len(b)} outputs.")


def _scaled(pair: Pair, scale: float, where: str) -> Pair:
    """The pair with `scale` inside `b`: in its own precision if exact there, else in float32."""
    if scale == 1 and pair.a.dtype == pair.b.dtype:
        return pair
    wide = pair.b.to(torch.promote_types(pair.b.dtype, torch.float32)) * scale
    if not _is_finite(wide):
        raise FormatError(f"{where}: scaling by {scale:g} overflows; its alpha cannot be right.")
    narrow = wide.to(pair.b.dtype)
    if pair.a.dtype == pair.b.dtype and torch.equal(narrow.to(wide.dtype), wide):
        return replace(pair, b=narrow)
    return replace(pair, b=wide).to(torch.promote_types(pair.a.dtype, wide.dtype))


def _is_finite(tensor: Tensor) -> bool:
    """Whether all numbers are; a sum says so at once, unless it overflows."""
    return math.isfinite(tensor.sum()) or bool(torch.isfinite(tensor).all())


def _parts(pair: Pair) -> list[tuple[Part, Tensor]]:
    parts: list[tuple[Part, Tensor]] = [("a", pair.a), ("b", pair.b)]
    return parts if pair.magnitude is None else [*parts, ("magnitude", pair.magnitude)]


def _config(adapter: Adapter) -> dict[str, Any]:
    """A LoraConfig under which PEFT scales nothing: alpha is the rank, layer by layer."""
    exceptions = {
        layer: pair.rank for layer, pair in adapter.pairs.items() if pair.rank != adapter.rank
    }
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.card.base or None,
        "inference_mode": True,
        "bias": "none",
        "r": adapter.rank,
        "lora_alpha": adapter.rank,
        "lora_dropout": 0.0,
        "rank_pattern": exceptions,
        "alpha_pattern": exceptions,
        "target_modules": sorted(adapter.pairs),
        "use_dora": any(pair.magnitude is not None for pair in adapter.pairs.values()),
    }


def _card(folder: Path, name: str, settings: Settings | None) -> Card:
    """The card beside the weights, or one that knows the base at least."""
    if (folder / CARD).exists():
        return replace(read_card(folder), name=name)
    return Card(name, base=settings.base if settings else "")


def _own_name(path: Path) -> str:
    """A file whose name says nothing is called after its folder."""
    path = path.resolve()
    if path.is_file():
        return path.parent.name if path.name in (*SAFE, *PICKLED) else path.stem
    return path.name
