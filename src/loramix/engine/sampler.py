"""Picking the next token."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import GenerationConfig

from loramix.engine import Sampling


class Sampler:
    """Picks one request's tokens from its logits, with random numbers of its own.

    So a seed gives the same tokens whatever runs beside it. What `sampling` leaves open comes from
    the model's generation config, and what that leaves open too is off: greedy, all tokens.
    """

    def __init__(self, sampling: Sampling, config: GenerationConfig) -> None:
        self.temperature = sampling.temperature
        if self.temperature is None:
            default = 1.0 if config.temperature is None else config.temperature
            self.temperature = float(default) if config.do_sample else 0.0
        self.top_p = float(_first(sampling.top_p, config.top_p, 1.0))
        self.top_k = int(_first(sampling.top_k, config.top_k, 0))  # 0 is all
        self.generator = torch.Generator()
        if sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(sampling.seed)

    def pick(self, logits: Tensor) -> int:
        """The next token, from float32 logits [V]."""
        if not self.temperature:
            return int(logits.argmax())
        probabilities = self.probabilities(logits).cpu()
        return int(torch.multinomial(probabilities, 1, generator=self.generator))

    def probabilities(self, logits: Tensor) -> Tensor:
        """[V], after temperature, then top-k, then top-p (https://arxiv.org/abs/1904.09751).

        Top-p keeps the fewest tokens that hold at least that much probability together.
        """
        assert self.temperature
        scaled = (logits - logits.max()) / self.temperature  # the best stays 0, however cold
        if 0 < self.top_k < len(scaled):
            scaled = scaled.masked_fill(scaled < scaled.topk(self.top_k).values[-1], -torch.inf)
        probabilities = scaled.softmax(-1)
        if self.top_p < 1:
            ordered, order = probabilities.sort(descending=True)
            beyond = ordered.cumsum(-1) - ordered >= self.top_p
            probabilities[order[beyond]] = 0.0
        return probabilities


def _first(*values: float | None) -> float:
    return next(value for value in values if value is not None)


def end_tokens(config: GenerationConfig) -> frozenset[int]:
    """The tokens that end an answer, by the model's own generation config."""
    end = config.eos_token_id
    if end is None:
        return frozenset()
    return frozenset(end) if isinstance(end, list) else frozenset([end])
