"""Noise in the embeddings of the rows that are learned: NEFTune, https://arxiv.org/abs/2310.05914.

Uniform in +-alpha / sqrt(L * D), for a row of L tokens and D numbers each, while learning only. A
row's noise is drawn from its expert's seed, its step and its tokens: it is the same whatever rows
are beside it, in whichever micro-batch or process, and in a run that was taken up again.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from loramix.train.batches import Batch
from loramix.train.learner import Learner


@contextmanager
def disturbed(model: nn.Module, learners: Sequence[Learner], batch: Batch) -> Iterator[None]:
    """The embeddings of this batch get the noise of their experts, if any has some."""
    if not any(learner.course.settings.noise for learner in learners):
        yield
        return
    owners = [k for k, count in enumerate(batch.counts) for _ in range(count)]

    def disturb(layer: nn.Module, given: Any, embedded: Tensor) -> Tensor:
        noise = torch.zeros(embedded.shape)
        for line, start, stop in batch.rows:
            own = learners[owners[line]]
            noise[line, start:stop] = drawn(own, batch.ids[line, start:stop], embedded.shape[-1])
        return embedded + noise.to(embedded)

    untyped: Any = model
    hook = untyped.get_input_embeddings().register_forward_hook(disturb)
    try:
        yield
    finally:
        hook.remove()


def drawn(learner: Learner, ids: Tensor, width: int) -> Tensor:
    """The noise [L, D] of a row in the step that the learner is about to make."""
    settings = learner.course.settings
    if not settings.noise:
        return torch.zeros(len(ids), width)
    told = repr((settings.seed, learner.step, ids.tolist())).encode()
    seed = int.from_bytes(hashlib.blake2b(told, digest_size=7).digest())
    uniform = torch.rand(len(ids), width, generator=torch.Generator().manual_seed(seed))
    return (2 * uniform - 1) * (settings.noise / math.sqrt(len(ids) * width))
