"""Adapters from the Hugging Face hub: its token, its offline mode, and its errors in one line."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from loramix.errors import AdapterError, LoramixError

# Its config and its weights, nothing of a base or of checkpoints that may lie in the repository.
FILES = ("adapter_config.json", "adapter_model.*", "adapters.safetensors", "card.json")
_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)


def is_hub_id(text: str) -> bool:
    """Whether this can be the id of a repository: an owner, a slash, a name."""
    return _ID.fullmatch(text) is not None and ".." not in text and not text.startswith(".")


def fetch(id: str, revision: str | None = None, *, files: Sequence[str] = FILES) -> Path:
    """The local folder of a repository's `files` (an adapter's), downloaded if not cached.

    HF_TOKEN opens gated and private repositories, HF_HUB_OFFLINE keeps to what is cached.
    Raises AdapterError.
    """
    from huggingface_hub import snapshot_download

    if not is_hub_id(id):
        raise AdapterError(f"{id!r} is no hub id; expected owner/name, or a folder that exists.")
    with explained(id, revision, AdapterError):
        return Path(snapshot_download(id, revision=revision, allow_patterns=list(files)))


@contextmanager
def explained(id: str, revision: str | None, kind: type[LoramixError]) -> Iterator[None]:
    """Whatever goes wrong with a repository of the hub becomes an error of this kind, one line."""
    from huggingface_hub import errors

    # Of the httpx that the hub's client uses, which differs from version to version.
    http_error: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]
    at = f"{id} at {revision}" if revision else id
    try:
        yield
    except errors.GatedRepoError as error:
        message = (
            f"{id} is gated: accept its terms on the hub and set HF_TOKEN to a token that may."
        )
        raise kind(message) from error
    except errors.RepositoryNotFoundError as error:
        message = f"The hub has no {id}; check the spelling, or set HF_TOKEN if it is private."
        raise kind(message) from error
    except errors.RevisionNotFoundError as error:
        raise kind(f"{id} has no revision {revision!r}; check it on the hub.") from error
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        raise kind(_unreachable(at, error.__cause__)) from error
    except errors.HfHubHTTPError as error:
        raise kind(_unreachable(at, error)) from error
    except (http_error, OSError, ValueError) as error:
        reason = str(error).split("\n")[0][:120] or type(error).__name__
        message = f"Cannot fetch {at} ({reason}); check the network and try again."
        raise kind(message) from error


def _unreachable(at: str, cause: BaseException | None) -> str:
    from huggingface_hub.constants import is_offline_mode
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(cause, HfHubHTTPError):
        status = cause.response.status_code
        return f"The hub answered {status} for {at}; check HF_TOKEN, or try again later."
    if is_offline_mode():
        return f"{at} is not in the cache and HF_HUB_OFFLINE is set; unset it to download."
    return f"{at} is not in the cache and the hub cannot be reached; check the network."
