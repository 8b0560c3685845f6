"""Which of several licences asks for most."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import yaml

from loramix.formats.folder import CARD

TIERS = (  # the hub's names, from the freest on
    ("cc0-1.0", "unlicense", "wtfpl"),
    ("mit", "bsd-2-clause", "bsd-3-clause", "isc", "zlib", "afl-3.0"),
    ("apache-2.0",),
    ("cc-by-3.0", "cc-by-4.0", "odc-by", "cdla-permissive-2.0"),
    ("mpl-2.0", "lgpl-2.1", "lgpl-3.0"),
    ("gpl-2.0", "gpl-3.0"),
    ("agpl-3.0",),
    ("cc-by-sa-3.0", "cc-by-sa-4.0"),
    ("openrail", "openrail++", "creativeml-openrail-m", "bigscience-openrail-m"),
    ("gemma",),
    ("llama2",),
    ("llama3",),
    ("llama3.1",),
    ("llama3.2",),
    ("cc-by-nc-4.0",),
    ("cc-by-nc-sa-4.0",),
    ("cc-by-nc-nd-4.0",),
)
COPYLEFT = 5  # from this tier on, two of them cannot be had by naming one
_TIER = {name: tier for tier, names in enumerate(TIERS) for name in names}


def strictest(licences: Iterable[str]) -> str:
    """The one that asks for most, in the hub's spelling; a guide for the card, not legal advice.

    "other" where one is not known here or two have terms of their own; "" if one is not stated.

    >>> strictest(["MIT", "Apache-2.0", "CC-BY-4.0"])
    'cc-by-4.0'
    >>> strictest(["llama2", "gemma"])
    'other'
    """
    named = sorted({licence.strip().lower() for licence in licences})
    if not named or "" in named:
        return ""
    if len(named) == 1:
        return named[0]
    if any(name not in _TIER for name in named):
        return "other"
    bound = [name for name in named if _TIER[name] >= COPYLEFT]
    if len(bound) > 1:
        return "other"
    return max(named, key=_TIER.__getitem__)


def stated_licence(folder: Path) -> str:
    """What a model's own files say: its card.json, else the front matter of its README.md, or "".

    A file that cannot be read states nothing.
    """
    for name, field in ((CARD, "licence"), ("README.md", "license")):
        try:
            head = (folder / name).read_text("utf-8").removeprefix("---").split("\n---")[0]
            found = yaml.safe_load(head).get(field)
        except (OSError, ValueError, AttributeError, yaml.YAMLError):
            continue
        if found and isinstance(found, str):
            return found
    return ""
