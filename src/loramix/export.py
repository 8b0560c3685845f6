"""Whole models: a copy of the base with adapters in its weights, where a training file asks for it.

export_dir: build/merged     # after training, or of adapter_name_or_path, if there are no rows
export_size: 5               # files of at most so many GB; else those that the base has
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from loramix.adapter import Adapter
from loramix.errors import TrainError
from loramix.formats import peft
from loramix.library import Library
from loramix.merge.recipe import Recipe
from loramix.merge.stream import base_folder, merge_into
from loramix.mix import Mix
from loramix.train.plans import Export


def check_export(export: Export) -> None:
    """TrainError for a folder that is there and not to be replaced."""
    if export.folder.exists() and not export.overwrite:
        raise TrainError(
            f"{export.folder} is there already; give another export_dir, or overwrite it "
            f"(overwrite_output_dir: true)."
        )


def export_experts(export: Export, experts: Sequence[Adapter]) -> list[Path]:
    """A model of each expert that was learned, in a folder of its own if there are several."""
    several = len(experts) > 1
    folders = [export.folder / one.name if several else export.folder for one in experts]
    for expert, folder in zip(experts, folders, strict=True):
        _merge(export, [expert], folder)
    return folders


def export_adapters(export: Export, library: Library) -> Path:
    """One model with all the adapters that a file without rows names."""
    check_export(export)
    adapters = [peft.read(library.locate(source)) for source in export.adapters]
    if len({adapter.name for adapter in adapters}) < len(adapters):
        raise TrainError("Two of adapter_name_or_path have one name; rename a folder.")
    _merge(export, adapters, export.folder)
    return export.folder


def _merge(export: Export, adapters: Sequence[Adapter], folder: Path) -> None:
    merge_into(
        base_folder(export.base, export.revision),
        {adapter.name: adapter for adapter in adapters},
        Recipe(Mix({adapter.name: 1.0 for adapter in adapters})),
        folder,
        shard_bytes=export.shard_bytes,
        replace=export.overwrite,
    )
