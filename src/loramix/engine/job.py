"""What a request comes to: tokens to compute, and who reads their logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loramix.base import Base
from loramix.engine import Chunk, Request
from loramix.engine.form import Forms
from loramix.engine.prompts import Prompts
from loramix.engine.reader import Echo, Scorer, Writer
from loramix.engine.sampler import Sampler, end_tokens
from loramix.engine.scheduler import Reader
from loramix.engine.text import Detokenizer, StopStrings


@dataclass(frozen=True, slots=True)
class Job:
    """What an answer comes to: tokens to compute, and a reader from the prompt's last one on."""

    request: Request
    tokens: Sequence[int]
    num_prompt: int
    limit: int  # tokens that are computed at most
    reader: Reader
    index: int = 0

    @property
    def first_read(self) -> int:
        """The first token whose logits matter: the prompt's last, unless all of its own do."""
        return self.num_prompt - 1 if self.request.sampling.prompt_logprobs is None else 0


class Jobs:
    """Makes them of requests. Any thread may call.

    Raises BadRequest and TooLong, as `Prompts` does, before there is anything to undo.
    """

    def __init__(self, base: Base, prompts: Prompts, vocabulary: int) -> None:
        self._tokenizer = base.tokenizer
        self._generation = base.model.generation_config
        self._prompts = prompts
        self._forms = Forms(base.tokenizer, vocabulary, end_tokens(self._generation))

    def written(self, request: Request, send: Callable[[Chunk], None]) -> list[tuple[Job, Writer]]:
        """A job and its writer for each of a request's answers."""
        prompt = self._prompts.read(request)
        request = self._prompts.fitted(request, len(prompt))
        limit = len(prompt) + request.sampling.max_tokens - 1  # the last token is not computed
        writers = [self._writer(request, prompt, index, send) for index in range(request.n)]
        num_top = request.sampling.prompt_logprobs
        return [
            (Job(request, prompt, len(prompt), limit, reader, index), writer)
            for index, writer in enumerate(writers)
            for reader in [writer if num_top is None else Echo(prompt, num_top, writer)]
        ]

    def scored(self, request: Request, continuation: str) -> tuple[Job, Scorer]:
        """The job of a continuation's likelihood, and who adds it up."""
        prompt, targets = self._prompts.continued(request, continuation)
        scorer = Scorer(targets)
        tokens = [*prompt, *targets[:-1]]
        return Job(request, tokens, len(prompt), len(tokens), scorer), scorer

    def _writer(
        self, request: Request, prompt: Sequence[int], index: int, send: Callable[[Chunk], None]
    ) -> Writer:
        sampling, config = request.sampling, self._generation
        self._prompts.require_room(len(prompt), sampling.max_tokens)
        self._prompts.require_tokens(sampling.logit_bias, "logit_bias")
        form = self._forms.follow(sampling.schema) if sampling.schema is not None else None
        return Writer(
            Sampler(sampling, config, prompt, index, form),
            Detokenizer(self._tokenizer, prompt),
            StopStrings(sampling.stop),
            end=end_tokens(config),
            num_prompt_tokens=len(prompt),
            max_tokens=sampling.max_tokens,
            logprobs=sampling.logprobs,
            index=index,
            send=send,
        )
