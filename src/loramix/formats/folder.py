"""What the files of a folder are called."""

from __future__ import annotations

from pathlib import Path

from loramix.errors import FormatError

CARD = "card.json"
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
TRAINING, PLOT = "training.json", "loss.svg"  # how an expert was learned
SAFE = (WEIGHTS, "adapters.safetensors")  # PEFT, MLX
PICKLED = ("adapter_model.bin", "adapter_model.pt")
RECIPE = "merge.json"  # beside the weights of what was merged


def find_weights(folder: Path) -> Path:
    """The file of an adapter's folder that holds its tensors; FormatError if there is none."""
    for name in (*SAFE, *PICKLED):
        if (folder / name).exists():
            return folder / name
    inside = sorted(child.name for child in folder.iterdir())
    shown = ", ".join(inside[:4]) + (", ..." if len(inside) > 4 else "") if inside else "nothing"
    checkpoints = any(name.startswith("checkpoint-") for name in inside)
    hint = "give one of its checkpoint folders or" if checkpoints else "give"
    raise FormatError(
        f"{folder} has no {' or '.join(SAFE)} (it holds {shown}); {hint} the adapter's own folder."
    )
