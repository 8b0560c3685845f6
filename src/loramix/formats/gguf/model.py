"""A whole model as a GGUF file: each tensor is read, renamed, rounded once and written.

Matrices take the precision asked for; vectors stay in float32. What llama.cpp would compute
otherwise than transformers is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter, LlamaFileType, quants
from torch import Tensor

from loramix.errors import FormatError
from loramix.formats.checkpoint import Checkpoint
from loramix.formats.gguf.hyper import describe_model, rope_factors
from loramix.formats.gguf.layout import Layout, layout
from loramix.formats.gguf.vocab import Tell, vocabulary
from loramix.formats.gguf.writing import KINDS, Entry, write_gguf

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILE_TYPES = {
    "f32": LlamaFileType.ALL_F32,
    "f16": LlamaFileType.MOSTLY_F16,
    "bf16": LlamaFileType.MOSTLY_BF16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
    "q4_0": LlamaFileType.MOSTLY_Q4_0,
}
_BUFFERS = re.compile(r"rotary_emb\.inv_freq$|\.attn\.(masked_)?bias$")  # of old files
_GENTLE = {"token_embd", "output"}  # lose most from four bits


def write_model(
    checkpoint: Checkpoint,
    tokenizer: PreTrainedTokenizerBase,
    file: str | Path,
    *,
    kind: str = "f16",
    tell: Tell = lambda line: None,
) -> None:
    """Write a model and its tokenizer. `tell` hears what is not quite as in transformers.

    Raises FormatError for what llama.cpp cannot hold, AdapterError if the file exists.
    """
    if kind not in KINDS:
        raise FormatError(f"Unknown GGUF type {kind!r}; expected {', '.join(KINDS)}.")
    config = checkpoint.config
    plan = layout(config)
    words = vocabulary(tokenizer, config.vocab_size, tell)
    entries = [*_entries(checkpoint, plan, KINDS[kind]), *_rope(checkpoint)]

    def describe(writer: GGUFWriter) -> None:
        writer.add_type("model")
        writer.add_name(checkpoint.folder.resolve().name)
        writer.add_file_type(FILE_TYPES[kind])
        writer.add_quantization_version(2)
        describe_model(writer, config, tell)
        words.describe(writer)

    write_gguf(Path(file), plan.family.architecture, describe, entries)


def _entries(checkpoint: Checkpoint, plan: Layout, kind: Kind) -> Iterator[Entry]:
    """One for each tensor of the checkpoint; FormatError for one that has no place."""
    written = set()
    for name, shape in sorted(checkpoint.shapes().items()):
        full = _full_name(name, plan)
        if _BUFFERS.search(full) or (plan.tied and full == "lm_head.weight"):
            continue
        layer, _, part = full.rpartition(".")
        own = plan.name(layer)
        if part not in ("weight", "bias"):
            raise FormatError(f"{name} has no place in GGUF; expected weights and biases alone.")
        turned = plan.family.transposed and len(shape) == 2 and own.startswith("blk.")
        final = shape[::-1] if turned else shape
        chosen = _kind(own, final, kind)
        written.add(own)
        yield Entry(f"{own}.{part}", final, chosen, _maker(checkpoint, name, own, plan, turned))
    expected = {plan.name(layer) for layer in _layers(plan)}
    if missing := sorted(expected - written):
        raise FormatError(f"{checkpoint.folder} lacks {len(missing)} layers ({missing[0]}).")


def _maker(
    checkpoint: Checkpoint, name: str, own: str, plan: Layout, turned: bool
) -> Callable[[], Tensor]:
    def make() -> Tensor:
        tensor = checkpoint.tensor(name)
        if plan.family.norm_offset and own.endswith("norm"):
            return tensor.float() + plan.family.norm_offset
        return plan.reorder(own, tensor.T if turned else tensor)

    return make


def _kind(own: str, shape: tuple[int, ...], kind: Kind) -> Kind:
    """Vectors and positions in float32; rows that do not divide into blocks in half precision."""
    if len(shape) == 1 or own == "position_embd":
        return Kind.F32
    if kind == Kind.Q4_0 and own in _GENTLE:
        kind = Kind.Q8_0
    try:
        quants.quant_shape_to_byte_shape(shape, kind)
    except ValueError:
        return Kind.F16
    return kind


def _rope(checkpoint: Checkpoint) -> Iterator[Entry]:
    factors = rope_factors(checkpoint.config)
    if factors is not None:
        yield Entry("rope_freqs.weight", tuple(factors.shape), Kind.F32, lambda: factors)


def _layers(plan: Layout) -> Iterator[str]:
    yield from (name for name in plan.family.outside if not (name == "lm_head" and plan.tied))
    for block in range(plan.num_blocks):
        yield from (f"{plan.family.blocks}.{block}.{inside}" for inside in plan.family.inside)


def _full_name(name: str, plan: Layout) -> str:
    """With the prefix that the first GPT-2 files lack."""
    prefix = plan.family.blocks.partition(".")[0]
    bare = not name.startswith((f"{prefix}.", "lm_head."))
    return f"{prefix}.{name}" if bare and plan.family.transposed else name
