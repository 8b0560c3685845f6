"""A model with its linear layers in four bits, by GPTQ or AWQ, through llm-compressor.

The folder that comes out is in the format compressed-tensors, which vLLM and transformers open.
GPTQ (https://arxiv.org/abs/2210.17323) rounds column by column and corrects what is left for the
error so far; AWQ (https://arxiv.org/abs/2306.00978) scales up what meets large inputs first. Both
look at the model's inputs on a few rows.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loramix.base import Base, open_base
from loramix.chat import Example, answered_ids
from loramix.errors import FormatError
from loramix.formats.aside import aside
from loramix.formats.checkpoint import open_checkpoint
from loramix.formats.folder import CARD, RECIPE
from loramix.linear import shape
from loramix.mixed import linear_layers

JUDGED, LAST = 4, 64  # rows and their last tokens that the loss is measured on


def write_four_bits(
    source: str, rows: Sequence[Example], out: Path, *, kind: str, group_size: int = 128
) -> float:
    """Round a model's linear layers to four bits, in groups of `group_size` inputs a scale.

    Gives the mean KL(model || rounded) of next tokens in nats, on some of the rows. The output
    layer and the embedding keep their precision. Raises FormatError for what the library cannot
    round, BaseError.
    """
    _check_library(kind)
    checkpoint = open_checkpoint(source)
    stored = str(checkpoint.config.dtype or "float32").removeprefix("torch.")
    base = open_base(source, dtype=stored)
    _check_layers(base, group_size)
    tokens = [_ids(base, row) for row in rows]
    before = _log_probabilities(base, tokens)
    _round(base, tokens, kind, group_size)
    lost = _distance(before, _log_probabilities(base, tokens))
    with aside(out) as place:
        base.model.save_pretrained(place, save_compressed=True)
        base.tokenizer.save_pretrained(place)
        _write_origin(
            checkpoint.folder, place, {"method": kind, "bits": 4, "group_size": group_size}
        )
    return lost


def _check_library(kind: str) -> None:
    """FormatError if it is not here, or there is no GPU for its AWQ."""
    if find_spec("llmcompressor") is None:
        raise FormatError(
            f"{kind} needs llm-compressor, which asks for a transformers of its own: in another "
            f"environment, pip install 'loramix[gptq]', and give the folder to that loramix."
        )
    if kind == "awq" and not torch.accelerator.is_available():
        raise FormatError("awq needs a GPU in llm-compressor; use gptq here, or run it there.")


def _check_layers(base: Base, group_size: int) -> None:
    """FormatError unless every linear layer is one that the library rounds, in whole groups."""
    for name, layer in linear_layers(base.model).items():
        if name == _output(base):
            continue
        if type(layer) is not nn.Linear:
            raise FormatError(f"{name} is stored transposed, and llm-compressor passes it over.")
        width = shape(layer)[1]
        if width % group_size:
            raise FormatError(
                f"{name} has {width} inputs, no multiple of {group_size}; give a smaller "
                f"--group-size, such as 64 or 32."
            )


def _ids(base: Base, row: Example) -> list[int]:
    ids = answered_ids(base.tokenizer, row.messages)
    if len(ids) > base.context:
        raise FormatError(
            f"The row {row.query[:40]!r} has {len(ids)} tokens, but this model holds "
            f"{base.context}; drop or shorten it."
        )
    return ids


def _output(base: Base) -> str:
    """The name of the output layer."""
    model: Any = base.model
    head = model.get_output_embeddings()
    found: str = next(name for name, module in model.named_modules() if module is head)
    return found


def _round(base: Base, tokens: Sequence[Sequence[int]], kind: str, group_size: int) -> None:
    """In place; the library shows its progress, and of its log the errors."""
    os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "ERROR")
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor import oneshot
    from llmcompressor.modifiers.awq import AWQModifier
    from llmcompressor.modifiers.gptq import GPTQModifier

    weights = QuantizationArgs(
        num_bits=4, strategy="group", group_size=group_size, symmetric=kind == "gptq"
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    modifier = {"gptq": GPTQModifier, "awq": AWQModifier}[kind]
    rows: Any = [{"input_ids": torch.tensor(ids)} for ids in tokens]
    oneshot(
        model=base.model,
        dataset=torch.utils.data.DataLoader(rows, batch_size=1),
        recipe=[modifier(config_groups={"group_0": scheme}, ignore=[_output(base)])],
        num_calibration_samples=len(rows),
    )


def _log_probabilities(base: Base, tokens: Sequence[Sequence[int]]) -> list[Tensor]:
    """Of the last next tokens of some rows, [T, V]."""
    found = []
    with torch.inference_mode():
        for ids in tokens[:JUDGED]:
            output: Any = base.model(torch.tensor([ids], device=base.device), use_cache=False)
            found.append(output.logits[0, -LAST:].float().log_softmax(-1))
    return found


def _distance(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """The mean KL(before || after), in nats."""
    pairs = zip(before, after, strict=True)
    return float(torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in pairs]).mean())


def _write_origin(source: Path, place: Path, how: dict[str, object]) -> None:
    """The model's card and recipe, but for what was true of its own files only."""
    if (source / CARD).is_file():
        shutil.copyfile(source / CARD, place / CARD)
    if (source / RECIPE).is_file():
        recipe = json.loads((source / RECIPE).read_text("utf-8"))
        kept = {key: value for key, value in recipe.items() if key not in ("tensors", "proof")}
        text = json.dumps(kept | {"rounded": how}, indent=2, ensure_ascii=False)
        (place / RECIPE).write_text(text + "\n", "utf-8")
