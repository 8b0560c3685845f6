"""What an expert begins with beside the base: an adapter that is learned on, others below it.

    adapter_name_or_path: a          a's own factors are learned on
    adapter_name_or_path: a,b        b's are, over the base with a
    create_new_adapter: true         fresh ones are, over the base with a and b

As in LLaMA-Factory, which merges what lies below into the base it learns over. Here the base is
shared, so what lies below acts beside it, and is part of the finished expert: that is then what
was learned, over the base as it is, and mixes with any other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from loramix.adapter import Adapter
from loramix.errors import TrainError
from loramix.lora import Pair, stack
from loramix.train.config import Settings
from loramix.train.start import OUTPUT_LAYERS


@dataclass(frozen=True, slots=True)
class Begun:
    """Updates by layer, their scale inside, as everywhere."""

    pairs: Mapping[str, Pair] = field(default_factory=dict)  # learned on; empty: fresh ones are
    below: Mapping[str, Pair] = field(default_factory=dict)  # acts, and is not learned
    scale: float = 1.0  # of `pairs`, in the file they come from
    names: tuple[str, ...] = ()  # where all that comes from

    def settings(self, own: Settings) -> Settings:
        """An expert's settings, where what is learned on decides: its rank, layers and scale."""
        if not self.pairs:
            return own
        rank = max(pair.rank for pair in self.pairs.values())
        return replace(
            own,
            rank=rank,
            alpha=self.scale * rank,
            rslora=False,
            dora=_is_dora(self.pairs),
            start="default",
            targets=tuple(self.pairs),
        )


def begin(
    adapters: Sequence[Adapter], scales: Sequence[float], own: Settings, *, new: bool
) -> Begun:
    """An expert's beginning from adapters, in this order; the last one is learned on unless `new`.

    `scales` are those of their files, which are in their pairs. Raises TrainError for what cannot
    be learned over.
    """
    for adapter in adapters:
        _check(adapter)
    last = None if new else adapters[-1]
    lower = adapters if new else adapters[:-1]
    found = Begun(
        pairs={} if last is None else _wide(last.pairs),
        below=_below(lower),
        scale=1.0 if last is None else scales[-1],
        names=tuple(adapter.name for adapter in adapters),
    )
    settings = found.settings(own)
    if lower and (settings.dora or settings.start != "default" or settings.dropout):
        raise TrainError(
            f"What is learned over {', '.join(a.name for a in lower)} must be a plain LoRA, fresh "
            f"or learned on; drop use_dora, pissa_init, olora_init and lora_dropout."
        )
    return found


def _check(adapter: Adapter) -> None:
    heads = [name for name in adapter.pairs if name.rpartition(".")[2] in OUTPUT_LAYERS]
    if heads:
        raise TrainError(
            f"{adapter.name!r} changes the output layer {heads[0]}, which is not learned here; "
            f"begin from an adapter of the inner layers."
        )


def _below(adapters: Sequence[Adapter]) -> dict[str, Pair]:
    """The sum of adapters, as one update a layer."""
    if gained := next((adapter.name for adapter in adapters if _is_dora(adapter.pairs)), None):
        raise TrainError(
            f"{gained!r} is a DoRA, which is no sum of factors and cannot lie below another; "
            f"turn it into a plain LoRA first (loramix convert --base BASE --rank R)."
        )
    layers = dict.fromkeys(name for adapter in adapters for name in adapter.pairs)
    return _wide(
        {name: stack((1.0, a.pairs[name]) for a in adapters if name in a.pairs) for name in layers}
    )


def _is_dora(pairs: Mapping[str, Pair]) -> bool:
    return any(pair.magnitude is not None for pair in pairs.values())


def _wide(pairs: Mapping[str, Pair]) -> dict[str, Pair]:
    return {name: pair.to(torch.float32) for name, pair in pairs.items()}
