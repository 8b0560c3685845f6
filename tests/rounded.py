"""The ways a base is rounded, and the tiny base that all of them can round."""

from __future__ import annotations

import pytest

from loramix.quantized import Int8Linear, Nf4Linear

KINDS = {"int8": Int8Linear, "nf4": Nf4Linear}
WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}  # whole groups of 64


def needs(kind: str) -> None:
    """Skip the test unless this way can be had."""
    if kind == "nf4":
        pytest.importorskip("bitsandbytes")
