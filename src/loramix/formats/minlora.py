"""An adapter as the state dict that minLoRA loads (https://github.com/cccntu/minLoRA)."""

from __future__ import annotations

import io
from pathlib import Path

import torch

from loramix.adapter import Adapter
from loramix.errors import FormatError
from loramix.formats.aside import aside

STEM = "parametrizations.weight.0.lora_"


def write_minlora(adapter: Adapter, file: str | Path) -> None:
    """Write `adapter` for a model to which minLoRA gave layers of this rank and its alpha of 1.

    minLoRA multiplies by alpha / rank and files do not say alpha, so `b` is multiplied by the rank.
    Raises FormatError for DoRA and for more than one rank, AdapterError if the file exists.
    """
    ranks = {pair.rank for pair in adapter.pairs.values()}
    if len(ranks) > 1 or any(pair.magnitude is not None for pair in adapter.pairs.values()):
        raise FormatError(
            f"minLoRA has one rank for all layers and no DoRA; {adapter.name!r} has the ranks "
            f"{', '.join(map(str, sorted(ranks)))}: convert it with one rank first."
        )
    tensors = {}
    for layer, pair in adapter.pairs.items():
        tensors[f"{layer}.{STEM}A"] = pair.a.clone()
        tensors[f"{layer}.{STEM}B"] = pair.b * pair.rank
    data = io.BytesIO()  # on a full disk torch.save itself ends in an error of its own making
    torch.save(tensors, data)
    with aside(Path(file)) as place:
        place.write_bytes(data.getvalue())
