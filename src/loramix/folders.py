"""Where models and adapters are: pocket in the package, the user's own in a folder of theirs."""

from __future__ import annotations

import os
from pathlib import Path

POCKET = Path(__file__).with_name("pocket")
POCKET_BASE = POCKET / "base"
POCKET_LIBRARY = POCKET / "library"


def default_library(base: str) -> Path:
    """Where adapters are looked for: beside pocket for pocket, else in your own library.

    Yours is $LORAMIX_LIBRARY, or `library` in the user's data folder for loramix.
    """
    return POCKET_LIBRARY if base == "pocket" else own_library()


def own_library() -> Path:
    """The user's library; it need not exist yet."""
    if given := os.environ.get("LORAMIX_LIBRARY"):
        return Path(given).expanduser()
    return _own_data() / "library"


def own_database(name: str = "loramix.db") -> str:
    """Where keys and conversations are: $LORAMIX_DATABASE, or a file in the user's data folder."""
    return os.environ.get("LORAMIX_DATABASE") or f"sqlite:///{_own_data() / name}"


def _own_data() -> Path:
    if os.name == "nt":
        data = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    else:
        data = Path(os.environ.get("XDG_DATA_HOME", Path.home() / ".local" / "share"))
    return data / "loramix"
