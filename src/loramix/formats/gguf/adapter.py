"""An adapter as the GGUF file that llama.cpp applies beside its base, and back.

llama.cpp multiplies `b @ a` by scale * alpha / rank, and by scale alone if alpha is 0. A `Pair`
holds its own scale inside `b`, so alpha is written as 0: exact for rsLoRA and for any pattern of
ranks and alphas. Matrices are stored in float32 unless another precision is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gguf import GGUFReader, GGUFWriter, Keys, quants
from torch import Tensor

from loramix.adapter import Adapter, Card
from loramix.errors import FormatError
from loramix.formats.checkpoint import skeleton
from loramix.formats.gguf.layout import Layout, layout
from loramix.formats.gguf.writing import KINDS, Entry, write_gguf
from loramix.formats.keys import summary
from loramix.formats.peft import digest
from loramix.lora import Pair
from loramix.mix import check_name, slug
from loramix.mixed import check_fit, linear_shapes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

PRECISIONS = ("f32", "f16", "bf16")


def write_adapter(
    adapter: Adapter, config: PreTrainedConfig, file: str | Path, *, kind: str = "f32"
) -> None:
    """Write an adapter of the base that `config` describes. Raises AdapterError if the file exists,
    FormatError for a layer or a family that has no place in GGUF and for DoRA, BaseMismatch for
    an update of another shape than its layer's.
    """
    if kind not in PRECISIONS:
        raise FormatError(
            f"A GGUF adapter is stored in {', '.join(PRECISIONS)}, not {kind!r}: so small a file "
            f"gains nothing from fewer bits."
        )
    plan = layout(config)
    names = {plan.name(layer): pair for layer, pair in adapter.pairs.items()}
    check_fit(adapter, linear_shapes(skeleton(config)))
    entries = [entry for name, pair in names.items() for entry in _entries(name, pair, plan, kind)]

    def describe(writer: GGUFWriter) -> None:
        writer.add_type("adapter")
        writer.add_name(adapter.name)
        writer.add_string(Keys.Adapter.TYPE, "lora")
        writer.add_float32(Keys.Adapter.LORA_ALPHA, 0.0)
        if adapter.card.description:
            writer.add_description(adapter.card.description)
        if adapter.card.licence:
            writer.add_license(adapter.card.licence)
        if adapter.card.base:
            writer.add_base_model_count(1)
            writer.add_base_model_name(0, adapter.card.base)

    write_gguf(Path(file), plan.family.architecture, describe, entries)


def read_adapter(file: str | Path, config: PreTrainedConfig, *, name: str | None = None) -> Adapter:
    """The adapter in a GGUF file, in float32, for the base that `config` describes.

    Raises FormatError for what is no adapter of this base, or is not exactly a LoRA.
    """
    file = Path(file)
    reader = _open(file)
    plan = layout(config)
    if (found := _text(reader, Keys.General.ARCHITECTURE)) != plan.family.architecture:
        raise FormatError(
            f"{file} is for a {found or 'nameless'} base, not for {plan.family.architecture}; "
            f"give the base it was made for."
        )
    alpha = _number(reader, Keys.Adapter.LORA_ALPHA, file)
    pairs = {
        plan.layer(tensor): _pair(tensor, parts, plan, alpha, file)
        for tensor, parts in _parts(reader, file).items()
    }
    own = name or slug(file.stem)
    base = _text(reader, Keys.General.BASE_MODEL_NAME.format(id=0))
    card = Card(
        check_name(own),
        description=_text(reader, Keys.General.DESCRIPTION),
        base=base,
        licence=_text(reader, Keys.General.LICENSE),
    )
    return Adapter(own, pairs, digest(pairs), card)


def _entries(name: str, pair: Pair, plan: Layout, kind: str) -> Iterator[Entry]:
    if pair.magnitude is not None:
        raise FormatError(
            f"The update of {name} is a DoRA, which llama.cpp cannot apply; convert it to a plain "
            f"LoRA of a chosen rank first."
        )
    b = plan.reorder(name, pair.b)
    for part, tensor in (("a", pair.a), ("b", b)):
        shape = tuple(tensor.shape)
        own = f"{name}.weight.lora_{part}"
        yield Entry(own, shape, KINDS[kind], partial(Tensor.detach, tensor))


def _open(file: Path) -> GGUFReader:
    """A GGUF file that says it is a LoRA."""
    try:
        reader = GGUFReader(file)
        kind = _text(reader, Keys.General.TYPE), _text(reader, Keys.Adapter.TYPE)
    except FileNotFoundError as error:
        raise FormatError(f"{file} does not exist; give the GGUF file of an adapter.") from error
    except (OSError, ValueError, KeyError, IndexError, TypeError, OverflowError) as error:
        reason = str(error).split("\n")[0][:120]
        raise FormatError(f"{file} is not a whole GGUF file ({reason}); fetch it again.") from error
    if kind != ("adapter", "lora"):
        raise FormatError(
            f"{file} is {kind[0] or 'no adapter'} ({kind[1] or 'no LoRA'}); expected the GGUF file "
            f"of a LoRA adapter."
        )
    return reader


def _parts(reader: GGUFReader, file: Path) -> dict[str, dict[str, Tensor]]:
    """The tensors of each update by GGUF's name of its layer."""
    parts: dict[str, dict[str, Tensor]] = {}
    strays = []
    for tensor in reader.tensors:
        layer, _, part = tensor.name.rpartition(".weight.lora_")
        if part not in ("a", "b"):
            strays.append(tensor.name)
            continue
        values = quants.dequantize(tensor.data, tensor.tensor_type)
        parts.setdefault(layer, {})[part] = torch.from_numpy(np.array(values, np.float32))
    if strays or not parts:
        held = f"more than LoRA: {summary(strays)}" if strays else "no update"
        raise FormatError(f"{file} holds {held}; use an adapter trained as plain LoRA.")
    return parts


def _pair(name: str, parts: Mapping[str, Tensor], plan: Layout, alpha: float, file: Path) -> Pair:
    if missing := {"a", "b"} - parts.keys():
        raise FormatError(f"{file}: {name} lacks its {missing.pop().upper()}; fetch it again.")
    a, b = parts["a"], parts["b"]
    if a.dim() != 2 or b.dim() != 2 or len(a) != b.shape[1]:
        shapes = f"A {list(a.shape)} and B {list(b.shape)}"
        raise FormatError(f"{file}: {name} has {shapes}; expected [R, D] and [O, R].")
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise FormatError(f"{file}: {name} holds NaN or infinity; use another adapter.")
    scale = alpha / len(a) if alpha else 1.0
    return Pair(a, plan.restore(name, b) * scale)


def _text(reader: GGUFReader, key: str) -> str:
    found = _value(reader, key)
    return found if isinstance(found, str) else ""


def _number(reader: GGUFReader, key: str, file: Path) -> float:
    found = _value(reader, key)
    if not isinstance(found, float | int):
        raise FormatError(f"{file} does not say its {key}, so its scale is unknown.")
    return float(found)


def _value(reader: GGUFReader, key: str) -> Any:
    found = reader.get_field(key)
    return None if found is None else found.contents()
