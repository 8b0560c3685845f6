"""The frozen base model: opened once, never changed, identified by a fingerprint of its weights."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from loramix.errors import BaseError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

POCKET = Path(__file__).parent / "pocket"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class Base:
    """A causal language model of transformers with its tokenizer, in eval mode on one device."""

    id: str  # hub id, folder name, or "pocket"
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str  # of the weights as stored, whatever dtype they are opened in

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def context(self) -> int:
        """The most tokens a prompt and its answer may have together."""
        return int(self.model.config.get_text_config().max_position_embeddings)


def best_device() -> str:
    """CUDA, then Apple's MPS, then the CPU."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def open_base(
    source: str = "pocket",
    *,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
) -> Base:
    """Open a base by folder or hub id; "pocket" is the small one inside this package.

    `dtype` "auto" is float32 on the CPU (exact, and as fast for small models) and the checkpoint's
    own elsewhere. Gated models use HF_TOKEN; HF_HUB_OFFLINE is respected. Custom code of a
    repository is never run. Raises BaseError.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = best_device() if device == "auto" else device
    path = str(POCKET / "base") if source == "pocket" else source
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=_dtype(dtype, device), **options)
        model = model.to(torch.device(device)).eval()
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise BaseError(_explain(source, error)) from error
    name = Path(source).name if Path(source).is_dir() else source
    return Base(name, model, tokenizer, fingerprint(cast("PreTrainedModel", model)))


def fingerprint(model: PreTrainedModel) -> str:
    """Sixteen hex digits that tell bases apart: names and shapes, and a sample of each matrix.

    The sample is rounded to bfloat16, so one checkpoint opened in any dtype has one fingerprint.
    Adapted layers are read through to their base, so binding adapters does not change it.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(_plain_names(model)):
        flat = tensor.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 64)][:64].float().bfloat16()
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(sample.view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _plain_names(model: PreTrainedModel) -> list[tuple[str, torch.Tensor]]:
    return [(name.replace(".base.", "."), tensor) for name, tensor in model.named_parameters()]


def _dtype(name: str, device: str) -> torch.dtype | str:
    if name == "auto":
        return torch.float32 if device == "cpu" else "auto"
    if name not in DTYPES:
        raise BaseError(f"Unknown dtype {name!r}; expected auto, {', '.join(DTYPES)}.")
    return DTYPES[name]


def _explain(source: str, error: Exception) -> str:
    """One line for a user: what was tried, what went wrong, what to do."""
    reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
    return (
        f"Cannot open the base {source!r}: {reason} Expected a folder with config.json, weights and "
        f"a tokenizer, or a hub id (set HF_TOKEN for gated models), or 'pocket'."
    )
