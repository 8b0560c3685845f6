"""The folder of a whole model: its config, and its tensors one at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from loramix.errors import BaseError
from loramix.folders import POCKET_BASE

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_QUANTISED = ": it is quantised; give the unquantised model that it was made from."


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Where each tensor of a model lies. Nothing is read before it is asked for."""

    folder: Path
    config: PreTrainedConfig
    files: Mapping[str, Path]  # by tensor

    def tensor(self, name: str) -> Tensor:
        """In the precision it is stored in; BaseError if the file does not hold it, or in a format
        of few bits, whose numbers mean nothing without scales.
        """
        try:
            with safe_open(self.files[name], framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise BaseError(f"Cannot read {name} of {self.folder}: {error}.") from error
        if tensor.element_size() < 2 and str(tensor.dtype) != "torch.bool":
            kind = str(tensor.dtype).removeprefix("torch.")
            raise BaseError(f"{name} of {self.folder} is {kind}{_QUANTISED}")
        return tensor

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all tensors, from the files' headers alone."""
        found: dict[str, tuple[int, ...]] = {}
        try:
            for path in sorted(set(self.files.values())):
                with safe_open(path, framework="pt") as file:
                    inside = {key for key in file.keys() if self.files.get(key) == path}  # noqa: SIM118
                    found |= {key: tuple(file.get_slice(key).get_shape()) for key in inside}
        except (SafetensorError, OSError) as error:
            raise BaseError(f"Cannot read the weights in {self.folder}: {error}.") from error
        if lost := self.files.keys() - found.keys():
            raise BaseError(f"{self.folder} lacks {len(lost)} tensors ({min(lost)}); fetch it.")
        return found


def open_config(source: str) -> PreTrainedConfig:
    """The config of a base: "pocket", a folder, or a hub id. Raises BaseError."""
    from transformers import AutoConfig

    path = str(POCKET_BASE) if source == "pocket" else source
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0][:160]
        raise BaseError(
            f"Cannot read the config of {source!r}: {reason} Expected a folder with config.json, "
            f"a hub id, or 'pocket'."
        ) from error
    return config


def open_checkpoint(source: str) -> Checkpoint:
    """The model in a folder, or "pocket". BaseError if it has no safetensors, or is quantised."""
    folder = POCKET_BASE if source == "pocket" else Path(source)
    if not (folder / "config.json").is_file():
        raise BaseError(f"{source} has no config.json; expected the folder of a whole model.")
    config = open_config(str(folder))
    if getattr(config, "quantization_config", None):
        raise BaseError(f"{source} has a quantization_config{_QUANTISED}")
    return Checkpoint(folder, config, _files(folder))


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a config without its weights."""
    import torch
    from transformers import AutoModelForCausalLM

    make: Any = AutoModelForCausalLM
    with torch.device("meta"):
        model: PreTrainedModel = make.from_config(config)
    return model


def open_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model's weights. Raises BaseError."""
    from transformers import AutoTokenizer

    try:
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False
        )
    except Exception as error:  # whatever transformers makes of somebody else's files
        reason = str(error).strip().split("\n")[0][:160].rstrip(".:") or type(error).__name__
        raise BaseError(
            f"Cannot read the tokenizer in {folder}: {reason}; copy tokenizer.json and its "
            f"companions there."
        ) from error
    return found


def _files(folder: Path) -> dict[str, Path]:
    try:
        if (folder / INDEX).is_file():
            index = json.loads((folder / INDEX).read_text("utf-8"))
            return {name: folder / Path(file).name for name, file in index["weight_map"].items()}
        if (folder / SINGLE).is_file():
            with safe_open(folder / SINGLE, framework="pt") as file:
                return dict.fromkeys(file.keys(), folder / SINGLE)
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise BaseError(f"The weights in {folder} cannot be read ({error}); fetch it.") from error
    raise BaseError(f"{folder} has no {SINGLE} and no {INDEX}; save the model as safetensors.")
