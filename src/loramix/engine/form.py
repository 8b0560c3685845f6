"""Answers in a given form: which tokens may come next if the whole is to follow a JSON schema.

The work is llguidance's (https://github.com/guidance-ai/llguidance).
"""

from __future__ import annotations

import threading
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from loramix.errors import BadRequest, EngineError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# White space where a reader expects it and nowhere else, so that no answer is endless blanks.
LAYOUT: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Forms:
    """Forms for the answers of one base, whose vocabulary is read when the first is asked for."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, vocabulary: int, end: frozenset[int]
    ) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._end = end
        self._lock = threading.Lock()

    def follow(self, schema: str) -> Form:
        """A form for one answer. BadRequest for what is no schema, or one that cannot be kept to.

        The first call takes about a second where the vocabulary is large.
        """
        from llguidance import LLMatcher

        if not self._end:
            raise BadRequest("This base has no end token, so no answer can end as a schema asks.")
        try:
            grammar = LLMatcher.grammar_from_json_schema(schema, defaults=LAYOUT)
            matcher = LLMatcher(self._words, grammar, log_level=0)
            reason = matcher.get_error() if matcher.is_error() else ""
        except (ValueError, RuntimeError) as error:
            reason = str(error)
        if reason:
            raise BadRequest(
                f"The JSON schema cannot be followed: {' '.join(reason.split())[:300]}; change it."
            )
        return Form(matcher, self._vocabulary)

    @property
    def _words(self) -> Any:
        with self._lock:
            return self._read

    @cached_property
    def _read(self) -> Any:
        from llguidance.hf import from_tokenizer

        tokenizer: Any = self._tokenizer
        return from_tokenizer(tokenizer, n_vocab=self._vocabulary, eos_token=sorted(self._end))


class Form:
    """Where one answer stands in its form."""

    def __init__(self, matcher: Any, vocabulary: int) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary

    def mask(self, logits: Tensor) -> Tensor:
        """[V], minus infinity where the form would be left; at its end only end tokens remain."""
        packed = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        bits = np.unpackbits(packed, count=self._vocabulary, bitorder="little")
        allowed = torch.from_numpy(bits.astype(bool)).to(logits.device)
        allowed = torch.nn.functional.pad(allowed, (0, len(logits) - len(allowed)))
        return logits.masked_fill(~allowed, -torch.inf)

    def take(self, token: int) -> None:
        """Go on by the token that was picked."""
        if not self._matcher.consume_token(token):
            raise EngineError(f"The form of the answer was left: {self._matcher.get_error()}")
