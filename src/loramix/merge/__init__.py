"""Merging: a mix as one adapter, or inside a copy of its base.

`loramix.merge(...)` is a function and this package, whose modules it must not hide: the package can
be called.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Merge(ModuleType):
    def __call__(self, *values: Any, **options: Any) -> Any:
        """`loramix.merge.merger.merge`, with torch loaded only now."""
        from loramix.merge.merger import merge

        return merge(*values, **options)


sys.modules[__name__].__class__ = _Merge
