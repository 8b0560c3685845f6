"""Rows of datasets on the hub, through the `datasets` library: its splits, subsets and cache."""

from __future__ import annotations

import os
from collections.abc import Iterator

from loramix.errors import TrainError
from loramix.formats.hub import explained, is_hub_id
from loramix.train.files import KINDS, Record


def is_hub_source(text: str) -> bool:
    """Whether this names a dataset on the hub, and no file of rows."""
    name = text.partition("@")[0].removesuffix(".gz")
    return is_hub_id(text.partition("@")[0]) and name.rpartition(".")[2].lower() not in KINDS


def fetch_rows(id: str, subset: str | None, split: str) -> tuple[str, Iterator[Record]]:
    """The commit of a dataset's revision, and its rows at that commit, counted from 1.

    HF_HUB_OFFLINE keeps to what is cached; no commit is known then, and the digest of the rows
    tells whether they are the same. Code of a repository is never run. Raises TrainError.
    """
    name, _, revision = id.partition("@")
    if not is_hub_id(name):
        raise TrainError(f"{id!r} is no hub id; expected owner/name, or owner/name@revision.")
    _silence()
    try:
        from datasets import exceptions, load_dataset
    except ImportError as error:
        raise TrainError(
            f"Reading {name} from the hub needs datasets; pip install 'loramix[datasets]', or "
            f"download a file of it."
        ) from error
    commit = _commit(name, revision or None)
    try:
        found = load_dataset(name, subset, split=split, revision=commit or revision or None)
    except exceptions.DatasetGenerationError as error:
        raise _unread(id, error.__cause__ or error) from error
    except Exception as error:  # whatever it makes of somebody else's files
        raise _unread(id, error) from error
    return commit, ((number, row) for number, row in enumerate(found, start=1))


def _commit(name: str, revision: str | None) -> str:
    """The commit that a revision is of now; "" offline."""
    from huggingface_hub import HfApi
    from huggingface_hub.constants import is_offline_mode

    if is_offline_mode():
        return ""
    with explained(name, revision, TrainError):
        return str(HfApi().dataset_info(name, revision=revision).sha)


def _unread(id: str, error: BaseException) -> TrainError:
    reason = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
    return TrainError(
        f"Cannot read the dataset {id} ({reason}); check subset and split, fetch it once with the "
        f"network, or download a file of it and give that."
    )


def _silence() -> None:
    """Its bars would run through the lines of a command."""
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
