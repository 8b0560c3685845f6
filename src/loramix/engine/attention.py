"""Attention over one packed row in which every request sees its own tokens and nothing else.

A step lays the new tokens of all requests end to end in one row [1, N], without padding. The
model's code is transformers' own: it hands each layer's keys and values to `StepCache.update`,
which files them with their requests, and then calls `attend`, which runs each request's queries
over that request's keys. The cost is the sum over requests: no mask spans two of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from loramix.engine.cache import History
from loramix.engine.newest import attend_alone, can_attend
from loramix.errors import EngineError
from loramix.native import Native

NAME = "loramix"


@dataclass(frozen=True, slots=True, eq=False)
class Span:
    """The rows of a step that belong to one request, and what that request has seen before."""

    start: int
    end: int
    history: History
    masks: dict[int | None, Tensor] = field(default_factory=dict)  # by window, shared by layers

    @property
    def first(self) -> int:
        """The position of the first row within its request."""
        return self.history.num_tokens

    @property
    def num_rows(self) -> int:
        return self.end - self.start

    def rows(self, of_step: Tensor) -> Tensor:
        """The request's part of [1, H, N, D], as a view."""
        return of_step.narrow(2, self.start, self.end - self.start)

    def mask(self, window: int | None, num_keys: int, device: torch.device) -> Tensor:
        """Which keys each row may see, [T, S]: those before it and itself, within the window."""
        if window not in self.masks:
            rows = torch.arange(num_keys - self.num_rows, num_keys, device=device)[:, None]
            keys = torch.arange(num_keys, device=device)[None]
            seen = keys <= rows
            self.masks[window] = seen if window is None else seen & (keys > rows - window)
        return self.masks[window]


@dataclass(frozen=True, slots=True)
class Seen:
    """One layer's keys and values for a step: of each span's request, all its tokens so far."""

    spans: Sequence[Span]
    pairs: Sequence[tuple[Tensor, Tensor]]  # each [1, H, S, D]
    native: Native | None = None  # what attends for single rows, if it can


class StepCache:
    """What a model takes for its cache during one step (transformers' `past_key_values`)."""

    is_compileable = False

    def __init__(self, spans: Sequence[Span], native: Native | None = None) -> None:
        self.spans = spans
        self.native = native

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Seen, Seen]:
        """File [1, H, N, D] with the requests; `attend` gets the results as key and value."""
        pairs = [
            span.history.append(layer_idx, span.rows(keys), span.rows(values))
            for span in self.spans
        ]
        seen = Seen(self.spans, pairs, self.native)
        return seen, seen

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """None of the row is in the past: positions are given explicitly."""
        return 0


def attend(
    module: nn.Module,
    query: Tensor,
    key: Seen,
    value: Seen,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: query [1, H, N, D] -> [1, N, H, D].

    Raises EngineError for what it cannot do exactly: masks, biases and sinks of the model's own.
    """
    extras = {"attention_mask": attention_mask, "s_aux": options.get("s_aux")}
    extras["position_bias"] = options.get("position_bias")
    if key is not value or dropout or any(extra is not None for extra in extras.values()):
        raise EngineError(f"{type(module).__name__} needs more than causal attention.")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    _, heads, num_rows, width = query.shape
    result = query.new_empty(1, num_rows, heads, width)
    native = key.native if softcap is None and can_attend(query, *key.pairs[0]) else None
    alone: list[tuple[int, Tensor, Tensor]] = []
    for span, (keys, values) in zip(key.spans, key.pairs, strict=True):
        if span.num_rows > 1:
            part = _many(span.rows(query), keys, values, span, scale, sliding_window, softcap)
        else:
            if sliding_window is not None:
                keys, values = keys[:, :, -sliding_window:], values[:, :, -sliding_window:]
            if native:
                alone.append((span.start, keys, values))
                continue
            part = _one(span.rows(query), keys, values, scale, softcap)
        result[:, span.start : span.end] = part.transpose(1, 2)
    if native and alone:
        attend_alone(native, query, alone, scale, result)
    return result, None


def _one(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """The newest token sees every key; query heads that share keys become rows."""
    _, heads, _, width = query.shape
    shared = query.reshape(1, keys.shape[1], -1, width)
    return _weigh(shared, keys, values, None, scale, softcap).reshape(1, heads, 1, -1)


def _many(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    span: Span,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """A chunk of a prompt: each token sees those before it and itself."""
    shares = query.shape[1] // keys.shape[1]
    if shares > 1:
        keys = keys.repeat_interleave(shares, dim=1)
        values = values.repeat_interleave(shares, dim=1)
    mask = span.mask(window, keys.shape[2], query.device)
    return _weigh(query, keys, values, mask, scale, softcap)


def _weigh(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """softmax(query keys^T) values, the products passed through softcap * tanh(. / softcap)."""
    if softcap is None:
        return F.scaled_dot_product_attention(query, keys, values, mask, scale=scale)
    products = softcap * torch.tanh(query @ keys.transpose(2, 3) * scale / softcap)
    if mask is not None:
        products = products.masked_fill(~mask, -torch.inf)
    return products.softmax(-1, dtype=torch.float32).to(query.dtype) @ values


def configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """The configs that the model's parts read their attention implementation from."""
    found = {id(config): config for part in model.modules() if (config := _config(part))}
    return list(found.values())


def _config(part: nn.Module) -> PreTrainedConfig | None:
    config = getattr(part, "config", None)
    return config if isinstance(config, PreTrainedConfig) else None


@contextmanager
def packed(parts: Sequence[PreTrainedConfig]) -> Iterator[None]:
    """Calls of the model inside use `attend`; outside, the model is as it was."""
    before = [config._attn_implementation for config in parts]
    for config in parts:
        config._attn_implementation = NAME
    try:
        yield
    finally:
        for config, name in zip(parts, before, strict=True):
            config._attn_implementation = name


AttentionInterface.register(NAME, attend)  # transformers builds no mask for a name it has none for
