"""An adapter as a value: named low-rank updates for the layers of one base model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loramix.lora import Pair


@dataclass(frozen=True, slots=True)
class Card:
    """What people and the router need to know of an adapter; no tensors.

    `examples` are a few queries it is good at. `weight` is the one its author recommends.
    `scores` maps a metric to its value on held-out rows, for instance {"exact": 0.95}.
    `system_prompt` is that of chats which bring none.
    """

    name: str
    description: str = ""
    skills: tuple[str, ...] = ()
    examples: tuple[str, ...] = ()
    weight: float = 1.0
    base: str = ""  # hub id or name of the base model it was trained on
    base_fingerprint: str = ""  # `Base.fingerprint`, empty when unknown
    licence: str = ""
    scores: Mapping[str, float] = field(default_factory=dict)
    system_prompt: str = ""


@dataclass(frozen=True, slots=True)
class Adapter:
    """Updates by layer name, for instance "model.layers.0.self_attn.q_proj".

    `digest` is the sha256 of the tensors and what scales them: two files that act alike under one
    name share a KV cache, a changed file does not.
    """

    name: str
    pairs: Mapping[str, Pair]
    digest: str
    card: Card

    @property
    def rank(self) -> int:
        """The largest rank of its pairs."""
        return max(pair.rank for pair in self.pairs.values())
