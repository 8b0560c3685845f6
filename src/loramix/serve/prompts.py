"""The system prompts that adapters bring: each is on the adapter's card."""

from __future__ import annotations

from pathlib import Path

from loramix.errors import AdapterError, EngineError
from loramix.formats.card import read_card
from loramix.formats.folder import CARD

State = tuple[int, int]  # of a file: when it was written, and its size


class CardPrompts:
    """Reads a card again only when its file has changed, as every request asks."""

    def __init__(self) -> None:
        self._read: dict[Path, tuple[State, str]] = {}

    def of(self, folder: Path) -> str:
        """The prompt of the adapter in a folder, or ""; EngineError for a damaged card."""
        try:
            found = (folder / CARD).stat()
        except OSError:  # it has no card, or is in memory only
            return ""
        state = found.st_mtime_ns, found.st_size
        known, prompt = self._read.get(folder, (None, ""))
        if known != state:
            prompt = _read(folder)
            self._read[folder] = state, prompt
        return prompt


def _read(folder: Path) -> str:
    try:
        return read_card(folder).system_prompt
    except AdapterError as error:  # the library's fault, not the request's
        raise EngineError(str(error)) from error
