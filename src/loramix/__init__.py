"""One frozen base language model, many LoRA adapters, every request its own weighted mix.

    >>> import loramix
    >>> lm = loramix.open("pocket")  # doctest: +SKIP
    >>> answer = lm.ask("my card was stolen", mix="auto")  # doctest: +SKIP
    >>> answer.text, answer.mix  # doctest: +SKIP

Importing this package loads neither torch nor transformers; opening a model does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loramix.errors import LoramixError
from loramix.mix import Mix

if TYPE_CHECKING:
    from loramix.lm import LM, open

__all__ = ["LM", "LoramixError", "Mix", "open"]


def __getattr__(name: str) -> Any:
    if name in {"LM", "open"}:
        from loramix import lm

        return getattr(lm, name)
    raise AttributeError(f"module 'loramix' has no attribute {name!r}")
