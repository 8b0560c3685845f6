"""Prompts as tokens: read, checked, and refused before work starts where there is no room.

Any thread may call; long ones are read beside the event loop.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from loramix.chat import Message, prompt_ids
from loramix.engine import Request
from loramix.errors import BadRequest, TooLong

LONG = 4096  # characters or tokens of a prompt that takes more than a millisecond to read


class Prompts:
    """Reads requests for an engine of so many tokens and bytes of keys and values.

    All methods raise BadRequest for what cannot be read and TooLong for what has no room.
    """

    def __init__(
        self, tokenizer: Any, vocabulary: int, *, context: int, token_bytes: int, kv_bytes: int
    ) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._context = context  # tokens of a prompt and its answer together
        self._token_bytes = token_bytes  # of keys and values
        self._kv_bytes = kv_bytes

    def read(self, request: Request) -> list[int]:
        """The tokens of a request's prompt."""
        prompt = request.prompt
        if isinstance(prompt, str):
            _require_characters(prompt)
            tokens = self._tokens(prompt)
        else:
            messages = [part for part in prompt if isinstance(part, Message)]
            for message in messages:
                _require_characters(message.content)
            _require_characters(json.dumps(dict(request.template), ensure_ascii=False))
            tokens = [part for part in prompt if isinstance(part, int)]
            tokens = tokens or prompt_ids(self._tokenizer, messages, request.template)
        if not tokens or not prompt:
            raise BadRequest("The prompt is empty; expected at least one token.")
        self.require_tokens(tokens, "the prompt")
        return tokens

    def continued(self, request: Request, continuation: str) -> tuple[list[int], list[int]]:
        """A prompt's tokens and its continuation's."""
        prompt = self.read(request)
        _require_characters(continuation)
        targets = self._tokens(continuation, add_special_tokens=False)
        if isinstance(request.prompt, str):
            together = self._tokens(request.prompt + continuation)
            if together[: len(prompt)] == prompt:
                targets = together[len(prompt) :]
        if not targets:
            raise BadRequest("A continuation to score has no tokens; expected at least one.")
        self.require_room(len(prompt), len(targets))
        return prompt, targets

    def fitted(self, request: Request, num_prompt: int) -> Request:
        """The request with as many tokens as it asks for, or as fit if it leaves that open."""
        sampling = request.sampling
        room = min(self._context, self._kv_bytes // self._token_bytes) - num_prompt
        if not sampling.fit or room >= sampling.max_tokens:
            return request
        return replace(request, sampling=replace(sampling, max_tokens=max(1, room)))

    def require_room(self, num_prompt: int, num_more: int) -> None:
        if num_prompt + num_more > self._context:
            raise TooLong(
                f"The prompt has {num_prompt} tokens and up to {num_more} are to follow, but the "
                f"engine holds {self._context} together; shorten the prompt or lower max_tokens."
            )
        needed, budget = (num_prompt + num_more - 1) * self._token_bytes, self._kv_bytes
        if needed > budget:
            raise TooLong(
                f"The prompt's {num_prompt} tokens and up to {num_more} more take {needed:,} bytes "
                f"of keys and values, but the engine has {budget:,}; shorten the prompt, lower "
                f"max_tokens, or open the engine with more kv_bytes."
            )

    def require_tokens(self, tokens: Iterable[int], where: str) -> None:
        if not all(0 <= token < self._vocabulary for token in tokens):
            raise BadRequest(f"A token of {where} is not among 0 to {self._vocabulary - 1}.")

    def _tokens(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        encoded = self._tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)
        return list(encoded["input_ids"])


def is_slow(request: Request) -> bool:
    """Whether reading it takes milliseconds, in which an event loop should go on."""
    prompt = request.prompt
    if len(prompt) > LONG or request.sampling.schema is not None:
        return True
    return sum(len(part.content) for part in prompt if isinstance(part, Message)) > LONG


def _require_characters(text: str) -> None:
    """BadRequest for half a character (a lone surrogate), which no tokenizer can read."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRequest(
            f"Character {error.start} of the text is half a character (a lone surrogate, "
            f"{text[error.start]!a}); send whole ones."
        ) from error
