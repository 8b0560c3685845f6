"""Whether a merged model is still what was written: every tensor's bytes against `merge.json`."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from loramix.errors import MergeError
from loramix.formats.folder import RECIPE
from loramix.merge.journal import sha256_of
from loramix.merge.pipe import forget
from loramix.merge.stored import Stored, open_stored

NAMED = 3  # tensors that an error names


def verify(folder: str | Path) -> int:
    """Read a merged model back from its disk; the number of tensors, all as they were hashed.

    What the page cache holds of it is dropped first, so a disk that keeps something else than it
    was given is found out. Raises MergeError, which names the tensors that differ, and BaseError
    for files that are not whole.
    """
    folder = Path(folder)
    wanted, stored = _hashes(folder), open_stored(folder).tensors
    strays = sorted(wanted.keys() ^ stored.keys())
    if strays:
        raise MergeError(
            f"{folder} does not have the tensors that its {RECIPE} tells of: {_some(strays)}; "
            f"merge again, or fetch it again."
        )
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = dict(zip(stored, pool.map(_hash, stored.values()), strict=True))
    wrong = [name for name, sha256 in found.items() if sha256 != wanted[name]]
    if wrong:
        raise MergeError(
            f"{len(wrong)} of {len(found)} tensors of {folder} are not what was written: "
            f"{_some(wrong)}; check the disk and the memory, and merge again."
        )
    return len(found)


def _hashes(folder: Path) -> dict[str, str]:
    """The sha256 of each tensor by its name."""
    try:
        recipe = json.loads((folder / RECIPE).read_text("utf-8"))
        return {str(name): str(sha256) for name, sha256 in recipe["tensors"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise MergeError(
            f"{folder} has no {RECIPE} with the hashes of its tensors; give a folder that "
            f"loramix merge --into wrote."
        ) from error


def _hash(tensor: Stored) -> str:
    with tensor.file.open("rb") as stream:
        forget(stream.fileno(), tensor.offset, tensor.size_bytes)
        return sha256_of(stream.fileno(), tensor.offset, tensor.size_bytes)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
