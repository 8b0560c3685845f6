"""The loss of many mixes in one pass: every pair of a row and a point is a row of one batch.

Nothing is merged and nothing loaded between trials: a point becomes weights of gates (mixed.py),
which are also what the gradient is taken of. With G = dL/dy, the derivative by the weight of an
adapter is sum_t (B^T G_t) . (A x_t) over layers and tokens: it costs what the ranks cost.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from loramix.adapter import Adapter
from loramix.base import Base
from loramix.chat import Example, answered_ids, prompt_ids
from loramix.errors import BadRequest, SearchError
from loramix.gates import Gates
from loramix.library import check_fingerprint
from loramix.mixed import MixedModel

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loramix.search import Losses, Points

CPU_TOKENS, TOKENS = 1024, 16384  # of a pass: more fall out of caches, and pad more


@dataclass(frozen=True, slots=True)
class Row:
    """One example as tokens; its answer, with the mark that ends it, begins at `answer_at`."""

    ids: tuple[int, ...]
    answer_at: int

    @property
    def num_judged(self) -> int:
        return len(self.ids) - self.answer_at


class GateLoss:
    """Nats of the examples' answers under weights of adapters: a `Smooth` measure.

    A point has a weight per adapter or, with `per_layer`, one per adapter and layer it acts on, in
    the order of `owners` and `layers`. The base is wrapped while this is open. Raises BaseMismatch,
    BadRequest for a row without an answer, SearchError for one longer than the base's context.
    """

    def __init__(
        self,
        base: Base,
        adapters: Iterable[Adapter],
        examples: Sequence[Example],
        *,
        per_layer: bool = False,
    ) -> None:
        self.adapters = tuple(adapters)
        self.rows = [_row(base, example) for example in examples]
        parts = [part for each in self.adapters for part in (_parts(each) if per_layer else [each])]
        self.owners = tuple(part.name.partition("@")[0] for part in parts)
        self.layers = tuple(part.name.partition("@")[2] for part in parts)  # "" for all
        self._names = tuple(part.name for part in parts)
        self._batch_tokens = CPU_TOKENS if base.device.type == "cpu" else TOKENS
        for adapter in self.adapters:
            check_fingerprint(adapter, base)
        self._mixed = MixedModel(base.model)
        try:
            for part in parts:
                self._mixed.bind(part, base.dtype)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give the base back as it was."""
        self._mixed.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def sizes(self) -> NDArray[np.float64]:
        return np.array([row.num_judged for row in self.rows], dtype=float)

    @torch.inference_mode()
    def losses(self, points: Points, rows: Sequence[int]) -> Losses:
        weights = self._weights(points)
        pairs = [(row, n) for row in range(len(rows)) for n in range(len(points))]
        found = np.empty((len(points), len(rows)))
        for batch in self._batches([(self.rows[rows[row]], (row, n)) for row, n in pairs]):
            at = [n for _, (_, n) in batch]
            nats = self._nats([row for row, _ in batch], weights[at])
            for (_, (row, n)), value in zip(batch, nats.tolist(), strict=True):
                found[n, row] = value
        return found

    def gradient(self, point: Points, rows: Sequence[int]) -> tuple[Losses, Points]:
        weights = self._weights(point).requires_grad_()
        found = np.empty(len(rows))
        for batch in self._batches([(self.rows[row], (n, 0)) for n, row in enumerate(rows)]):
            nats = self._nats([row for row, _ in batch], weights.expand(len(batch), -1))
            nats.sum().backward()  # type: ignore[no-untyped-call]
            found[[n for _, (n, _) in batch]] = nats.detach().cpu().numpy()
        assert weights.grad is not None
        return found, weights.grad.double().cpu().numpy()

    def _weights(self, points: Points) -> Tensor:
        dtype = torch.promote_types(self._mixed.model.dtype, torch.float32)
        return torch.tensor(points, dtype=dtype, device=self._mixed.model.device)

    def _batches(
        self, pairs: Sequence[tuple[Row, tuple[int, int]]]
    ) -> Iterator[list[tuple[Row, tuple[int, int]]]]:
        """Rows of like length together, as many as a pass may have tokens."""
        batch: list[tuple[Row, tuple[int, int]]] = []
        for pair in sorted(pairs, key=lambda pair: len(pair[0].ids)):
            if batch and len(pair[0].ids) * (len(batch) + 1) > self._batch_tokens:
                yield batch
                batch = []
            batch.append(pair)
        if batch:
            yield batch

    def _nats(self, rows: Sequence[Row], weights: Tensor) -> Tensor:
        """Minus the log-likelihood of each row's answer, [N], under weights [N, P].

        Rows are padded on the right: attention is causal, so no token sees its padding.
        """
        ids = torch.zeros(len(rows), max(len(row.ids) for row in rows), dtype=torch.long)
        judged = torch.zeros_like(ids, dtype=torch.bool)  # where the next token is
        for n, row in enumerate(rows):
            ids[n, : len(row.ids)] = torch.tensor(row.ids)
            judged[n, row.answer_at - 1 : len(row.ids) - 1] = True
        targets = torch.cat([torch.tensor(row.ids[row.answer_at :]) for row in rows])
        device, active = weights.device, self._mixed.active
        with (
            self._mixed.output_at(judged),
            active.using(Gates(self._names, weights[:, None])),
        ):
            logits = self._mixed.model(input_ids=ids.to(device), use_cache=False).logits
        nats = F.cross_entropy(logits.to(weights.dtype), targets.to(device), reduction="none")
        parts = nats.split_with_sizes([row.num_judged for row in rows])
        return torch.stack([part.sum() for part in parts])


def _row(base: Base, example: Example) -> Row:
    """The prompt exactly as it is served, then the answer with the mark that ends it."""
    start = repr(example.query[:40])
    prompt = prompt_ids(base.tokenizer, example.messages[:-1])
    whole = answered_ids(base.tokenizer, example.messages)
    if not prompt or not example.answer.strip():
        raise BadRequest(f"The row {start} has no prompt or no answer; drop it.")
    if whole[: len(prompt)] != prompt:
        raise BadRequest(
            f"This chat template changes the prompt of {start} once it is answered; use a template "
            f"that only appends."
        )
    if len(whole) > base.context:
        raise SearchError(
            f"The row {start} has {len(whole)} tokens, but this base holds {base.context}; drop or "
            f"shorten it."
        )
    return Row(tuple(whole), len(prompt))


def _parts(adapter: Adapter) -> list[Adapter]:
    """An adapter for each layer of this one, named after both."""
    return [
        replace(adapter, name=f"{adapter.name}@{layer}", pairs={layer: pair})
        for layer, pair in adapter.pairs.items()
    ]
