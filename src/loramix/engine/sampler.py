"""Picking the next token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import GenerationConfig

from loramix.engine import LogProb, Sampling
from loramix.engine.form import Form

SPREAD = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio: no two answers' seeds are neighbours


class Sampler:
    """Picks one request's tokens from its logits, with random numbers of its own.

    So a seed gives the same tokens whatever runs beside it. What `sampling` leaves open comes from
    the model's generation config, and what that leaves open too is off: greedy, all tokens.
    `prompt` counts for the repetition penalty; `index` tells several answers to it apart; `form`
    forbids tokens.
    """

    def __init__(
        self,
        sampling: Sampling,
        config: GenerationConfig,
        prompt: Sequence[int] = (),
        index: int = 0,
        form: Form | None = None,
    ) -> None:
        self.temperature = sampling.temperature
        if self.temperature is None:
            default = 1.0 if config.temperature is None else config.temperature
            self.temperature = float(default) if config.do_sample else 0.0
        self.top_p = float(_first(sampling.top_p, config.top_p, 1.0))
        self.top_k = int(_first(sampling.top_k, config.top_k, 0))  # 0 is all
        self.min_p = float(_first(sampling.min_p, config.min_p, 0.0))
        self.repetition = float(_first(sampling.repetition_penalty, config.repetition_penalty, 1.0))
        self.presence = float(sampling.presence_penalty)
        self.frequency = float(sampling.frequency_penalty)
        self.bias = dict(sampling.logit_bias)
        self._seen = set(prompt) if self.repetition != 1 else set()
        self._said: list[int] = []
        self._form = form
        self.generator = torch.Generator()
        if sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed((sampling.seed + index * SPREAD) % (1 << 64))

    def pick(self, logits: Tensor) -> int:
        """The next token, from float32 logits [V]."""
        logits = self.penalised(logits)
        if self._form:
            logits = self._form.mask(logits)
        if not self.temperature:
            token = int(logits.argmax())
        else:
            probabilities = self.probabilities(logits).cpu()
            token = int(torch.multinomial(probabilities, 1, generator=self.generator))
        self._said.append(token)
        self._seen.add(token)
        if self._form:
            self._form.take(token)
        return token

    def penalised(self, logits: Tensor) -> Tensor:
        """[V], with the bias added, then the penalties for what the prompt and the answer said."""
        if self.bias:
            tokens = torch.tensor(list(self.bias), device=logits.device)
            values = torch.tensor(list(self.bias.values()), device=logits.device)
            logits = logits.index_add(0, tokens, values.to(logits.dtype))
        if self.repetition != 1 and self._seen:
            tokens = torch.tensor(sorted(self._seen), device=logits.device)
            found, rate = logits[tokens], self.repetition
            found = torch.where(found > 0, found / rate, found * rate)
            logits = logits.index_copy(0, tokens, found)
        if (self.presence or self.frequency) and self._said:
            said = torch.tensor(self._said, device=logits.device)
            tokens, counts = torch.unique(said, return_counts=True)
            logits = logits.index_add(0, tokens, -(self.presence + self.frequency * counts))
        return logits

    def probabilities(self, logits: Tensor) -> Tensor:
        """[V], after temperature, then top-k, then top-p (https://arxiv.org/abs/1904.09751), min-p.

        Top-p keeps the fewest tokens that hold at least that much probability together; min-p
        (https://arxiv.org/abs/2407.01082) those with at least that share of the likeliest's.
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
        if self.min_p:
            weak = probabilities < self.min_p * probabilities.max()
            probabilities = probabilities.masked_fill(weak, 0.0)
        return probabilities


def logprob(logits: Tensor, token: int, num_top: int) -> LogProb:
    """The log-probability of a picked token and of the `num_top` likeliest, from logits [V]."""
    values = logits.log_softmax(-1)
    best = values.topk(min(num_top, len(values)))
    top = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return LogProb(token, float(values[token]), tuple(top))


def _first(*values: float | None) -> float:
    return next(value for value in values if value is not None)


def end_tokens(config: GenerationConfig) -> frozenset[int]:
    """The tokens that end an answer, by the model's own generation config."""
    end = config.eos_token_id
    if end is None:
        return frozenset()
    return frozenset(end) if isinstance(end, list) else frozenset([end])
