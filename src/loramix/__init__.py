"""One frozen base language model, many LoRA adapters, every request its own weighted mix.

    >>> import loramix
    >>> lm = loramix.open("pocket")  # doctest: +SKIP
    >>> answer = lm.ask("my card was stolen", mix="auto")  # doctest: +SKIP
    >>> answer.text, answer.mix  # doctest: +SKIP

Importing this package loads neither torch nor transformers; opening a model does.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from loramix.errors import LoramixError
from loramix.mix import Mix

if TYPE_CHECKING:
    from loramix.lm import LM, open
    from loramix.merge.merger import Merger, merge

__all__ = ["LM", "LoramixError", "Merger", "Mix", "merge", "open"]


def __getattr__(name: str) -> Any:
    if name in {"LM", "open"}:
        from loramix import lm

        return getattr(lm, name)
    if name == "merge":
        return import_module("loramix.merge")
    if name == "Merger":
        from loramix.merge.merger import Merger

        return Merger
    raise AttributeError(f"module 'loramix' has no attribute {name!r}")
