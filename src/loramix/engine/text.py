"""Tokens become text as they come: whole characters, and nothing past a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BROKEN = "\ufffd"  # what bytes decode to that are no character, or not yet one
CHARACTER = 4  # the most tokens one character can take: it has at most four bytes
CONTEXT = 6  # tokens before the answer that decide how its first ones read


class Detokenizer:
    """Decodes one answer piece by piece, holding back tokens that end within a character.

    Tokens are decoded together with some before them, because a token may read differently at the
    start of a text (a leading space is dropped). Special tokens have no text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._tokens = list(prompt[-CONTEXT:])
        self._read = len(self._tokens)  # tokens whose text is out

    def push(self, token: int) -> str:
        """The text that this token completes."""
        self._tokens.append(token)
        text = self._pending(len(self._tokens))
        if not text.endswith(BROKEN):
            return self._take(len(self._tokens), text)
        end = len(self._tokens) - CHARACTER + 1
        if end > self._read:  # too old to be waiting for the rest of a character: it is broken
            return self._take(end, self._pending(end))
        return ""

    def flush(self) -> str:
        """What was held back, broken or not."""
        return self._take(len(self._tokens), self._pending(len(self._tokens)))

    def _pending(self, end: int) -> str:
        return self._decode(end)[len(self._decode(self._read)) :]

    def _take(self, end: int, text: str) -> str:
        self._tokens = self._tokens[max(0, end - CONTEXT) :]
        self._read = min(end, CONTEXT)
        return text

    def _decode(self, end: int) -> str:
        text = self._tokenizer.decode(
            self._tokens[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text


class StopStrings:
    """Cuts text before a stop string, holding back what may be the start of one.

    Of several the one that is complete first counts, so it does not matter how the text is cut up.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """The text that can be shown now; nothing any more once a stop string was found."""
        if self.found:
            return ""
        self._held += text
        places = [(at + len(s), at) for s in self._stops if (at := self._held.find(s)) >= 0]
        if places:
            self.found = True
            return self._release(min(places)[1])
        return self._release(len(self._held) - self._longest_start())

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        return "" if self.found else self._release(len(self._held))

    def _release(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        return text

    def _longest_start(self) -> int:
        """How much of the end may be the beginning of a stop string."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0
