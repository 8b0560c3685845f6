"""What layers are given while each adapter of a merge answers rows of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from loramix.adapter import Adapter
from loramix.chat import Example, answered_ids
from loramix.errors import MergeError
from loramix.lora import Pair
from loramix.merge.updates import Inputs, Updates

if TYPE_CHECKING:
    from loramix.base import Base
    from loramix.mixed import MixedModel


@dataclass(frozen=True, slots=True)
class Moments:
    """The inputs of every layer that one of the adapters updates."""

    by_layer: Mapping[str, Inputs]
    num_tokens: Mapping[str, int]  # by adapter, in the order of a mix
    digest: str  # of the tokens

    def describe(self) -> dict[str, Any]:
        """For the files that say how something was made."""
        return {"rows": {"tokens": dict(self.num_tokens), "digest": self.digest}}


class _Sums:
    """The inputs of one layer, summed up as they come, for each of several adapters."""

    def __init__(self, a: Tensor, count: int) -> None:
        self.a = a  # [R, D] of all adapters
        self.gram = torch.zeros(count, len(a), len(a), dtype=torch.double)
        self.squares = torch.zeros(count, a.shape[1], dtype=torch.double)

    def add(self, now: int, x: Tensor) -> None:
        x = x.reshape(-1, x.shape[-1]).to(self.a)
        read = (x @ self.a.T).double().cpu()
        self.gram[now] += read.T @ read
        self.squares[now] += x.square().sum(0).double().cpu()


def gathered(base: Base, adapters: Mapping[str, Adapter], examples: Sequence[Example]) -> Moments:
    """Run each adapter's rows under it alone and take the moments of what its layers are given.

    A row is its prompt with its answer, as it was learned, and says whose it is. Raises MergeError
    for rows of nobody, adapters without rows, and DoRA adapters, whose updates are no factors.
    """
    from loramix.gates import Gates
    from loramix.mixed import MixedModel

    adapters = dict(sorted(adapters.items()))  # as a mix names them
    rows = _rows(base, tuple(adapters), examples)
    sums = {layer: _Sums(a.to(base.device), len(adapters)) for layer, a in _readers(adapters)}
    mixed = MixedModel(base.model)
    try:
        for adapter in adapters.values():
            mixed.bind(adapter, base.dtype)
        for now, (name, lines) in enumerate(rows.items()):
            alone = Gates((name,), torch.ones(1, 1, 1, dtype=base.dtype, device=base.device))
            with _summing(mixed, sums, now), torch.inference_mode():
                for ids in lines:
                    with mixed.active.using(alone):
                        tokens = torch.tensor([ids], device=base.device)
                        mixed.model(input_ids=tokens, use_cache=False)
    finally:
        mixed.release()
    counts = {name: sum(map(len, lines)) for name, lines in rows.items()}
    each = torch.tensor(list(counts.values()), dtype=torch.double)
    return Moments(
        {
            layer: Inputs(of.gram / each[:, None, None], of.squares / each[:, None])
            for layer, of in sums.items()
        },
        counts,
        hashlib.sha256(repr(rows).encode()).hexdigest(),
    )


def _rows(
    base: Base, names: tuple[str, ...], examples: Sequence[Example]
) -> dict[str, list[list[int]]]:
    """The tokens of each adapter's rows."""
    rows: dict[str, list[list[int]]] = {name: [] for name in names}
    for example in examples:
        start = repr(example.query[:40])
        if example.adapter not in rows:
            raise MergeError(
                f'The row {start} is of {example.adapter or "no adapter"}; expected an "adapter" '
                f"of the mix: {', '.join(names)}."
            )
        ids = answered_ids(base.tokenizer, example.messages)
        if len(ids) > base.context:
            raise MergeError(
                f"The row {start} has {len(ids)} tokens, but this base holds {base.context}; drop "
                f"or shorten it."
            )
        rows[example.adapter].append(ids)
    if missing := [name for name, lines in rows.items() if not lines]:
        raise MergeError(f"There are no rows of {', '.join(missing)}; give some of each adapter.")
    return rows


def _readers(adapters: Mapping[str, Adapter]) -> Iterator[tuple[str, Tensor]]:
    """The A's of all adapters side by side, by layer, in the order in which they are merged."""
    names = tuple(adapters)
    for layer in sorted({layer for adapter in adapters.values() for layer in adapter.pairs}):
        found = [adapters[name].pairs.get(layer) for name in names]
        pairs: tuple[Pair | None, ...] = tuple(p and p.to(torch.float32) for p in found)
        updates = Updates(layer, names, torch.ones(len(names)), pairs)
        yield layer, updates.factors("regmean")[1]


@contextmanager
def _summing(mixed: MixedModel, sums: Mapping[str, _Sums], now: int) -> Iterator[None]:
    """What each layer is given meanwhile is added to its sums for the adapter numbered `now`."""

    def adding(of: _Sums) -> Callable[[Any, tuple[Tensor, ...]], None]:
        return lambda _, given: of.add(now, given[0])

    with ExitStack() as hooks:
        for layer, of in sums.items():
            hook = mixed.layers[layer].register_forward_pre_hook(adding(of))
            hooks.callback(hook.remove)
        yield
