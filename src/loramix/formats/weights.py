"""Opens one file of weights as named tensors, or says what the file is instead."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from loramix.errors import FormatError

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
WRAPPERS = {
    "state_dict",
    "model_state_dict",
    "model",
    "module",
    "lora",
    "lora_state_dict",
    "adapter",
}


@dataclass(frozen=True, slots=True)
class Opened:
    """The tensors of a file by name, and what else is in there (optimizer, epoch, a wrapper)."""

    tensors: dict[str, Tensor]
    rest: tuple[str, ...] = ()


def open_weights(file: Path, *, allow_pickle: bool = False) -> Opened:
    """Every tensor in `file`. Raises FormatError; a pickle is only opened when asked for, and then
    without running anything it says.
    """
    try:
        with file.open("rb") as stream:
            head = stream.read(64)
    except OSError as error:
        raise FormatError(f"{file} cannot be opened: {error.strerror}.") from error
    if head.startswith(b"version https://git-lfs"):
        raise FormatError(
            f"{file} is a git-LFS pointer, not the weights; run `git lfs pull` there."
        )
    if not head:
        raise FormatError(f"{file} is empty; fetch it again.")
    if head.startswith(b"GGUF"):
        raise FormatError(f"{file} is a GGUF file; turn it into PEFT with `loramix convert`.")
    if file.suffix == ".safetensors":
        return _open_safe(file)
    if file.suffix in PICKLE_SUFFIXES:
        return _open_pickle(file, allow_pickle)
    raise FormatError(
        f"{file} is of no kind read here; expected .safetensors or {', '.join(PICKLE_SUFFIXES)}."
    )


def _open_safe(file: Path) -> Opened:
    try:
        return Opened(load(file.read_bytes()))  # load_file of 0.8.0 leaks 64 bytes a tensor
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        reason = str(error).split("\n")[0]
        message = f"{file} is not a whole safetensors file ({reason}); fetch it again."
        raise FormatError(message) from error


def _open_pickle(file: Path, allow_pickle: bool) -> Opened:
    if not allow_pickle:
        raise FormatError(
            f"{file} is a pickle; pass allow_pickle if you trust where it comes from (it is opened "
            f"with weights_only), or convert it to safetensors."
        )
    try:
        tree = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise FormatError(
            f"{file} holds Python objects other than tensors, which are never loaded; save its "
            f"state dict alone, as safetensors."
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError) as error:
        reason = str(error).split("\n")[0][:120] or type(error).__name__
        raise FormatError(
            f"{file} is not a whole torch file ({reason}); fetch it again."
        ) from error
    if not isinstance(tree, Mapping):
        raise FormatError(f"{file} holds a {type(tree).__name__}; expected tensors by name.")
    return _flatten(tree)


def _flatten(tree: Mapping[Any, Any]) -> Opened:
    """The tensors of a state dict, and of those wrapped one inside another."""
    tensors: dict[str, Tensor] = {}
    rest: list[str] = []
    for key, value in tree.items():
        if isinstance(value, Tensor):
            tensors[str(key)] = value.detach()
        elif isinstance(value, Mapping) and key in WRAPPERS:
            inner = _flatten(value)
            tensors |= inner.tensors
            rest += [f"the wrapper {key!r}", *inner.rest]
        else:
            rest.append(str(key))
    return Opened(tensors, tuple(rest))
