"""Puts a folder on the Hugging Face hub in one commit, and takes one from there.

Large files go up first, each by its digest; a push that broke off finds them there and goes on with
the rest. The commit names all of them at once, so a repository never holds half a folder. The token
is read by the hub's own client and appears in no message.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from loramix.errors import FormatError, HubError
from loramix.formats.aside import aside
from loramix.formats.hub import fetch, is_hub_id
from loramix.formats.readme import README, describe, files, render

REASONS = {
    401: "set HF_TOKEN to a token of yours that may write",
    403: "the token may not write there; use one with write access to it",
    404: "check the name, and that the token may see it",
    409: "somebody else changed it meanwhile; push again",
    412: "somebody else changed it meanwhile; push again",
    413: "a file is too large for the hub",
    429: "too many requests; wait a while and push again: what is there already is not sent twice",
}


@dataclass(frozen=True, slots=True)
class Plan:
    """What a push sends: files and bytes; `readme` is written on the way if the folder has none."""

    folder: Path
    repository: str
    names: tuple[str, ...]
    size_bytes: int
    readme: str = ""


def plan(folder: str | Path, repository: str) -> Plan:
    """Check everything that can be known before anything is sent. Raises HubError, FormatError."""
    if not is_hub_id(repository):
        raise HubError(f"{repository!r} is no hub id; expected owner/name.")
    published = describe(folder)
    names = files(Path(folder))
    for name in names:
        if name.endswith(".safetensors"):
            _check_whole(Path(folder) / name)
    size = sum((Path(folder) / name).stat().st_size for name in names)
    readme = "" if README in names else render(published)
    everything = tuple(sorted({*names, README}))
    return Plan(Path(folder), repository, everything, size + len(readme.encode()), readme)


def _check_whole(file: Path) -> None:
    """FormatError for a file that breaks off, or is a pointer to one."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise FormatError(
            f"{file} is not a whole safetensors file ({error}); fetch it again."
        ) from error


def push(planned: Plan, *, private: bool = False, message: str = "") -> str:
    """Send a plan in one commit and return the commit's address. Raises HubError if any file fails.

    A repository that does not exist is made, public unless `private`.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(library_name="loramix")
    operations = []
    for name in planned.names:
        made = name == README and planned.readme
        content = planned.readme.encode() if made else planned.folder / name
        operations.append(CommitOperationAdd(path_in_repo=name, path_or_fileobj=content))
    with _told(planned.repository):
        api.create_repo(planned.repository, private=private or None, exist_ok=True)
        if private and not api.model_info(planned.repository).private:
            raise HubError(
                f"{planned.repository} exists and is public; push without --private, or make it "
                f"private on the hub first."
            )
        title = message or f"Upload {planned.folder.resolve().name} with loramix"
        commit = api.create_commit(planned.repository, operations, commit_message=title)
    return str(commit.commit_url)


def pull(repository: str, revision: str | None = None, out: str | Path | None = None) -> Path:
    """All files of a repository: in the hub's cache, or copied to a new folder `out`.

    What was downloaded before is not downloaded again. Raises AdapterError.
    """
    cached = fetch(repository, revision, files=("*",))
    if out is None:
        return cached
    with aside(Path(out)) as place:
        shutil.copytree(cached, place)
    return Path(out)


@contextmanager
def _told(repository: str) -> Iterator[None]:
    """The hub's errors as one line each, without addresses, which may be signed."""
    from huggingface_hub import errors

    http_error: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]
    try:
        yield
    except errors.OfflineModeIsEnabled as error:
        raise HubError("HF_HUB_OFFLINE is set; unset it to push.") from error
    except errors.LocalTokenNotFoundError as error:
        raise HubError(f"No token to push {repository} with; {REASONS[401]}.") from error
    except errors.HfHubHTTPError as error:
        raise HubError(_reason(repository, error.response.status_code)) from error
    except http_error as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        raise HubError(_reason(repository, status)) from error
    except (OSError, ValueError, RuntimeError) as error:
        raise HubError(_reason(repository, _status_below(error))) from error


def _reason(repository: str, status: int | None) -> str:
    if status is None:
        return f"Nothing was committed to {repository}: the connection broke; push again to go on."
    hint = REASONS.get(status, "push again later, what is there already is not sent twice")
    return f"Nothing was committed to {repository}: the hub answered {status}; {hint}."


def _status_below(error: BaseException) -> int | None:
    """The status in the error that caused this one, if the hub had answered."""
    while error.__cause__ is not None:
        error = error.__cause__
        if response := getattr(error, "response", None):
            return int(response.status_code)
    return None
