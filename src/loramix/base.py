"""The frozen base model: opened once, never changed, identified by a fingerprint of its weights."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from loramix.errors import BaseError
from loramix.folders import POCKET_BASE

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SAMPLE = 256  # signs of each tensor in a fingerprint
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
QUANTIZED = ("none", "int8", "nf4")


@dataclass(frozen=True, slots=True)
class Base:
    """A causal language model of transformers with its tokenizer, in eval mode on one device."""

    id: str  # hub id, folder name, or "pocket"
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str  # of the weights as stored, whatever dtype they are opened in
    quantized: str = "none"  # one of QUANTIZED

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def context(self) -> int:
        """The most tokens a prompt and its answer may have together; BaseError if unlimited."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if limit is None:
            kind = self.model.config.model_type
            raise BaseError(f"{self.id} ({kind}) states no context length; use another base.")
        return int(limit)


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
    quantize: str = "none",
) -> Base:
    """Open a base by folder or hub id; "pocket" is the small one inside this package.

    `dtype` "auto" is float32 on the CPU (exact, and as fast for small models) and the checkpoint's
    own elsewhere. `quantize` "int8" or "nf4" rounds its linear layers to eight or four
    bits a number (quantized.py); "auto" then means bfloat16. Gated models use HF_TOKEN;
    HF_HUB_OFFLINE is respected. Custom code of a repository is never run. Raises BaseError.
    """
    from transformers import AutoTokenizer

    path = str(POCKET_BASE) if source == "pocket" else source
    _check_source(path, revision)
    place = _device(device)
    if quantize not in QUANTIZED:
        raise BaseError(f"Unknown quantization {quantize!r}; expected {', '.join(QUANTIZED)}.")
    rounded = quantize != "none"
    wanted = _dtype("bfloat16" if rounded and dtype == "auto" else dtype, place)
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
        model, missing = _load(path, wanted, place, options)
    except Exception as error:  # whatever transformers makes of somebody else's files
        raise BaseError(_explain(source, error)) from error
    if missing:
        raise BaseError(
            f"The weights of {source!r} lack {len(missing)} tensors of {type(model).__name__} "
            f"(first: {missing[0]}); fetch it again, or use a causal language model."
        )
    name = Path(source).resolve().name if Path(source).is_dir() else source
    weights = fingerprint(model)  # before they are rounded
    if rounded:
        from loramix.quantized import quantize as rounded_to

        rounded_to(model, quantize)
    return Base(name, model, tokenizer, weights, quantize)


def _load(
    path: str, dtype: torch.dtype | str, device: torch.device, options: dict[str, Any]
) -> tuple[PreTrainedModel, list[str]]:
    """The model, and the weights that transformers had to make up because the files lack them."""
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, output_loading_info=True, **options
    )
    model: PreTrainedModel = loaded[0].to(device).eval()
    return model, sorted(loaded[1]["missing_keys"])


def fingerprint(model: PreTrainedModel) -> str:
    """Sixteen hex digits that tell bases apart: names, shapes and a sample of signs.

    Rounding never changes a sign bit, so one checkpoint opened in any precision has one
    fingerprint, while training flips some. Adapted layers are read through to their base.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(_plain_names(model)):
        flat = tensor.detach().flatten()
        signs = flat[:: max(1, flat.numel() // SAMPLE)][:SAMPLE].signbit()
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(signs.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _plain_names(model: PreTrainedModel) -> list[tuple[str, torch.Tensor]]:
    return [(name.replace(".base.", "."), tensor) for name, tensor in model.named_parameters()]


def _dtype(name: str, device: torch.device) -> torch.dtype | str:
    if name == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    if name not in DTYPES:
        raise BaseError(f"Unknown dtype {name!r}; expected auto, {', '.join(DTYPES)}.")
    return DTYPES[name]


def _device(name: str) -> torch.device:
    """The device, tried with one number: a name alone does not say that it is there."""
    try:
        device = torch.device(best_device() if name == "auto" else name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise BaseError(f"No device {name!r} here; expected auto, cpu, cuda or mps.") from error
    return device


def _check_source(path: str, revision: str | None) -> None:
    """Never ask the hub for what is clearly a path."""
    is_path = path.startswith(("/", ".", "~")) or path.count("/") > 1 or "\\" in path
    if not path.strip() or (is_path and not Path(path).exists()):
        raise BaseError(f"The base {path!r} does not exist; give a folder, a hub id or 'pocket'.")
    if Path(path).is_file():
        raise BaseError(f"The base {path!r} is a file; give the folder it is in.")
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise BaseError(f"{path!r} has no config.json; expected the folder of a whole model.")
    if Path(path).is_dir() and revision:
        raise BaseError(f"{path!r} is a local folder; a revision is for hub ids only.")


def _explain(source: str, error: Exception) -> str:
    """One line for a user: what was tried, what went wrong, what to do."""
    reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
    if "trust_remote_code" in str(error):
        reason = "it needs code of its own, which is never run."
    return (
        f"Cannot open the base {source!r}: {reason} Expected a folder with config.json, weights "
        f"and a tokenizer, or a hub id (set HF_TOKEN for gated models), or 'pocket'."
    )
