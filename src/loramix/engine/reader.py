"""What becomes of a request's logits: an answer that is written, or a score."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from loramix.engine import Answer, Chunk, Finish, LogProb
from loramix.engine.sampler import Sampler, logprob
from loramix.engine.text import Detokenizer, StopStrings


class Writer:
    """Picks tokens and sends their text on, until an end token, a stop string or the limit."""

    def __init__(
        self,
        sampler: Sampler,
        detokenizer: Detokenizer,
        stops: StopStrings,
        *,
        end: frozenset[int],
        num_prompt_tokens: int,
        max_tokens: int,
        logprobs: int | None = None,
        index: int = 0,
        send: Callable[[Chunk], None],
    ) -> None:
        self.tokens: list[int] = []
        self.logprobs: list[LogProb] = []
        self.prompt_logprobs: tuple[LogProb, ...] = ()  # set by an `Echo`
        self.finish: Finish | None = None
        self._sampler = sampler
        self._detokenizer = detokenizer
        self._stops = stops
        self._end = end
        self._num_prompt_tokens = num_prompt_tokens
        self._max_tokens = max_tokens
        self._num_top = logprobs
        self._index = index
        self._send = send
        self._texts: list[str] = []
        self._num_sent = 0

    @property
    def finished(self) -> bool:
        return self.finish is not None

    def read(self, logits: Tensor) -> list[int]:
        """Pick the next token from [1, V]; it is to be computed next unless it is the last."""
        token = self._sampler.pick(logits[-1])
        self.tokens.append(token)
        if self._num_top is not None:
            self.logprobs.append(logprob(logits[-1], token, self._num_top))
        text = self._text(token)
        if token in self._end or self._stops.found:
            self.finish = "stop"
        elif len(self.tokens) == self._max_tokens:
            self.finish = "length"
        if text or self.finish:
            self._send_on(text)
        return [] if self.finish else [token]

    def answer(self, num_cached_tokens: int, num_kept_tokens: int) -> Answer:
        assert self.finish is not None
        return Answer(
            text="".join(self._texts),
            tokens=tuple(self.tokens),
            finish=self.finish,
            num_prompt_tokens=self._num_prompt_tokens,
            num_cached_tokens=num_cached_tokens,
            num_kept_tokens=num_kept_tokens,
            logprobs=tuple(self.logprobs),
            index=self._index,
            prompt_logprobs=self.prompt_logprobs,
        )

    def _text(self, token: int) -> str:
        """What can be shown after this token; if it is the last, everything held back too."""
        is_end = token in self._end
        text = "" if is_end else self._detokenizer.push(token)
        if not is_end and len(self.tokens) < self._max_tokens:
            return self._stops.push(text)
        text = self._stops.push(text + self._detokenizer.flush())
        return text + self._stops.flush()

    def _send_on(self, text: str) -> None:
        num_tokens = len(self.tokens) - self._num_sent
        before = () if self._num_sent else self.prompt_logprobs
        logprobs = tuple(self.logprobs[self._num_sent :])
        self._num_sent = len(self.tokens)
        self._texts.append(text)
        size = self._num_prompt_tokens if self.finish else 0
        self._send(Chunk(text, num_tokens, self.finish, size, logprobs, self._index, before))


class Echo:
    """Notes how likely a prompt's own tokens are; then a writer goes on.

    Nothing comes before the first one, so its log-probability is NaN.
    """

    def __init__(self, prompt: Sequence[int], num_top: int, writer: Writer) -> None:
        self._left = list(prompt[1:])
        self._num_top = num_top
        self._writer = writer
        self._writer.prompt_logprobs = (LogProb(prompt[0], math.nan, ()),)

    @property
    def finished(self) -> bool:
        return self._writer.finished

    def read(self, logits: Tensor) -> list[int]:
        """Note the next tokens of the prompt by [T, V]; its last row is the writer's."""
        known, self._left = self._left[: len(logits)], self._left[len(logits) :]
        noted = [logprob(row, t, self._num_top) for row, t in zip(logits, known, strict=False)]
        self._writer.prompt_logprobs += tuple(noted)
        rest = logits[len(known) :]
        return self._writer.read(rest) if len(rest) else []


class Scorer:
    """Sums the log-likelihoods, in nats, of given tokens."""

    def __init__(self, targets: Sequence[int]) -> None:
        self.total = 0.0
        self._targets = targets
        self._num_read = 0

    @property
    def finished(self) -> bool:
        return self._num_read == len(self._targets)

    def read(self, logits: Tensor) -> list[int]:
        """Score the next targets by [T, V]; every token is known, so there is none to add."""
        targets = self._targets[self._num_read : self._num_read + len(logits)]
        rows = torch.arange(len(targets), device=logits.device)
        picked = logits.log_softmax(-1)[rows, torch.tensor(targets, device=logits.device)]
        self.total += float(picked.double().sum())
        self._num_read += len(targets)
        return []
