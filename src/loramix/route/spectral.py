"""A router that needs no examples: it asks the adapters' own matrices what they were made for.

An adapter's update dW = U S V^T answers strongly to inputs along its right singular directions V.
So the bare base reads the query once, and every adapter is scored by |S V^T x| = |dW x| over what
its layers are given (SpectR, arXiv:2504.03454; Arrow, arXiv:2405.11157, takes the first direction).

Raw, these norms compare the adapters' sizes, not their fit, and the strongest adapter gets every
query. So each layer's is put in standard deviations from what generic queries give it, and that is
all that is learned here: the packaged queries that belong to nobody, never a row of an adapter.
How little this finds out, beside a router that is fitted, docs/router.md says.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from loramix.adapter import Adapter
from loramix.base import Base
from loramix.chat import Message, prompt_ids
from loramix.errors import RouteError
from loramix.route import Decision, to_mix
from loramix.route.abstain import background
from loramix.route.ngrams import Floats, clip
from loramix.route.softmax import log_softmax
from loramix.route.turns import user_turns

GENERIC = 200  # queries that show what is usual


@dataclass(frozen=True, eq=False)
class SpectralRouter:
    """The adapter whose directions the query excites most, beyond what any query does.

    It reads the last user turn by itself, in one pass of the bare base, and always names an
    adapter: what it hears of its adapters' own queries is no stronger than of strangers'.
    """

    adapters: tuple[str, ...]
    ear: Ear
    mean: Floats  # [L, K] of the generic queries' energies
    scale: Floats  # [L, K]
    top: int = 1

    @classmethod
    def of(cls, base: Base, adapters: Sequence[Adapter], *, top: int = 1) -> SpectralRouter:
        """Listen to a base that no adapter is bound to. RouteError without an adapter."""
        if not adapters:
            raise RouteError("A spectral router needs one adapter at least; the library has none.")
        ear = Ear(base, adapters)
        texts = background()[:: len(background()) // GENERIC][:GENERIC]
        heard = np.stack([ear.energies(text) for text in texts])
        names = tuple(adapter.name for adapter in adapters)
        return cls(names, ear, heard.mean(0), heard.std(0) + 1e-6, top)

    def scores(self, queries: Sequence[str]) -> list[list[float]]:
        """Standard deviations above the usual, each adapter's mean over its layers."""
        return [self._excitement(query).tolist() for query in queries]

    def route(self, messages: Sequence[Message]) -> Decision:
        """The likeliest adapters, never the base. Raises RouteError."""
        started = time.perf_counter()
        found = self._excitement(user_turns(messages)[-1])
        best = int(found.argmax())
        return Decision(
            mix=to_mix(found.tolist(), self.adapters, top=self.top, temperature=1.0),
            scores=dict(zip(self.adapters, np.exp(log_softmax(found)).tolist(), strict=True)),
            none=0.0,
            reasons=(
                f"{self.adapters[best]}: its directions are excited {found[best]:.2f} deviations "
                "more than by generic queries",
            ),
            latency_ms=(time.perf_counter() - started) * 1e3,
        )

    def _excitement(self, query: str) -> Floats:
        """[K]"""
        deviations = (self.ear.energies(query) - self.mean) / self.scale
        return cast(Floats, np.nanmean(deviations, axis=0))


class Ear:
    """Hears what the layers of a bare base are given, and what each adapter makes of it.

    It has the base's modules of its own, over the same weights, so that an engine may wrap and
    serve the base meanwhile. One text at a time.
    """

    def __init__(self, base: Base, adapters: Sequence[Adapter]) -> None:
        shared = {id(tensor): tensor for tensor in base.model.buffers()}
        shared |= {id(p): torch.nn.Parameter(p.data, False) for p in base.model.parameters()}
        self._model: Any = copy.deepcopy(base.model, shared)
        self._base = base
        self._heard: dict[str, Floats] = {}
        self._one = Lock()
        for name in sorted({layer for adapter in adapters for layer in adapter.pairs}):
            module = self._model.get_submodule(name)
            hear = partial(self._hear, name, *_directions(name, adapters, base.device))
            module.register_forward_pre_hook(hear)

    @torch.inference_mode()
    def energies(self, text: str) -> Floats:
        """log(|dW x| / |x|), the mean over the tokens, [L, K]; NaN where an adapter has no pair."""
        ids = prompt_ids(self._base.tokenizer, (Message("user", clip(text)),))[
            -self._base.context :
        ]
        with self._one:
            self._model(input_ids=torch.tensor([ids], device=self._base.device), use_cache=False)
            return np.stack([self._heard[name] for name in sorted(self._heard)])

    def _hear(
        self, name: str, directions: Tensor, owners: Tensor, module: object, given: tuple[Any, ...]
    ) -> None:
        x = given[0].reshape(-1, directions.shape[1]).float()
        energy = (x @ directions.T).square() @ owners  # [T, K]
        ratio = energy.clamp_min(1e-20) / x.square().sum(1, keepdim=True).clamp_min(1e-20)
        has = owners.any(0)
        found = torch.where(has, ratio.log().mean(0) / 2, torch.nan)
        self._heard[name] = found.cpu().numpy()


def _directions(
    layer: str, adapters: Sequence[Adapter], device: torch.device
) -> tuple[Tensor, Tensor]:
    """S V^T of every adapter side by side, [sum R, D], and whose each row is, [sum R, K].

    With b = Q T (QR) the rows of T a have the same Gram matrix as those of S V^T, which is all that
    a norm sees, so no singular value is computed.
    """
    pairs = [
        (k, adapter.pairs[layer]) for k, adapter in enumerate(adapters) if layer in adapter.pairs
    ]
    parts = [torch.linalg.qr(pair.b.float()).R @ pair.a.float() for _, pair in pairs]
    owners = torch.zeros(sum(len(part) for part in parts), len(adapters))
    start = 0
    for (k, _), part in zip(pairs, parts, strict=True):
        owners[start : start + len(part), k] = 1
        start += len(part)
    return torch.cat(parts).to(device), owners.to(device)
