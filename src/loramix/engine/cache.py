"""Keys and values: of each running request, and of finished ones that a later request may reuse.

Reuse is keyed by the mix and the content of its adapters, never by tokens alone: the keys and
values of one mix are wrong for any other, and for the same names after an adapter was replaced.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

KEPT = "kept "  # before the key of what is right under no key
ROOM = 64  # tokens that a new buffer holds at least


class History:
    """The keys and values of one request, per layer, in buffers that double when they are full.

    Within a step each layer appends at `num_tokens`, and `advance` ends the step. Buffers get no
    more room than for `limit` tokens, if it is known that there will be no more. The first
    `num_kept` tokens were computed under another mix.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.num_tokens = 0
        self.limit = limit
        self.num_kept = 0
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}  # each [1, H, room, D]

    @property
    def size_bytes(self) -> int:
        return sum(keys.nbytes + values.nbytes for keys, values in self._layers.values())

    @property
    def token_bytes(self) -> int:
        """The bytes of one token's keys and values, once a step was taken."""
        buffers = [buffer for pair in self._layers.values() for buffer in pair]
        return sum(buffer[:, :, :1].nbytes for buffer in buffers)

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Take the step's keys and values, [1, H, T, D]; return those of all tokens so far."""
        start, end = self.num_tokens, self.num_tokens + keys.shape[2]
        if layer not in self._layers or self._layers[layer][0].shape[2] < end:
            old = self._layers.get(layer, (keys[:, :, :0], values[:, :, :0]))
            room = self._room(old[0].shape[2], end)
            self._layers[layer] = _grown(old[0], start, room), _grown(old[1], start, room)
        all_keys, all_values = self._layers[layer]
        all_keys.narrow(2, start, end - start).copy_(keys)
        all_values.narrow(2, start, end - start).copy_(values)
        return all_keys.narrow(2, 0, end), all_values.narrow(2, 0, end)

    def advance(self, num_tokens: int) -> None:
        self.num_tokens += num_tokens

    def prefix(self, num_tokens: int, limit: int | None = None) -> History:
        """A copy of the first tokens' keys and values, to be continued differently."""
        assert num_tokens <= self.num_tokens
        copy = History(limit)
        copy.num_tokens = num_tokens
        copy.num_kept = min(self.num_kept, num_tokens)
        for layer, (keys, values) in self._layers.items():
            room = copy._room(0, num_tokens + 1)
            copy._layers[layer] = _grown(keys, num_tokens, room), _grown(values, num_tokens, room)
        return copy

    def _room(self, before: int, needed: int) -> int:
        """Tokens that a new buffer should hold, where one for `before` became too small."""
        room = max(ROOM, needed, min(2 * before, 2 * needed))
        return room if self.limit is None else max(needed, min(room, self.limit))


def _grown(buffer: Tensor, used: int, room: int) -> Tensor:
    """A buffer with room for more tokens that holds the first `used` of this one."""
    _, heads, _, width = buffer.shape
    grown = buffer.new_empty(1, heads, room, width)
    grown[:, :, :used] = buffer[:, :, :used]
    return grown


@dataclass(frozen=True, slots=True)
class Entry:
    """What is known of a finished request."""

    history: History
    num_prompt: int  # its first tokens; the others are the answer


class PrefixCache:
    """Finished requests' keys and values, least recently used first, within a budget of bytes.

    They are found under the key they were stored under. One with kept tokens is right under no key
    and serves only requests that keep their history too.
    """

    def __init__(self, size_bytes: int) -> None:
        self.limit_bytes = size_bytes
        self.size_bytes = 0
        self._entries: OrderedDict[tuple[str, bytes], Entry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def longest(
        self, key: str, tokens: Sequence[int], limit: int | None = None, *, keep: bool = False
    ) -> History:
        """A history of the longest prefix of `tokens` computed under the same key; maybe empty.

        With `keep`, also an earlier turn of the conversation under any key, if it is longer: its
        prompt and some of its answer. It is a copy, to grow to `limit` tokens at most.
        """
        wanted = np.asarray(tokens, dtype=np.int64)
        raw = wanted.tobytes()
        best, best_name = 0, None
        own = [name for name in self._entries if name[0] == key]
        others = [name for name in self._entries if name[0] != key] if keep else []
        for name in [*own, *others]:
            # One that shares a token more than the best so far is better, and of another key one
            # that goes beyond its prompt.
            least = best if name[0] == key else max(best, self._entries[name].num_prompt)
            if least < len(wanted) and name[1][: 8 * (least + 1)] == raw[: 8 * (least + 1)]:
                best, best_name = _shared(wanted, np.frombuffer(name[1], np.int64)), name
        if best_name is None:
            return History(limit)
        self._entries.move_to_end(best_name)
        copy = self._entries[best_name].history.prefix(best, limit)
        if best_name[0] != key:
            copy.num_kept = best
        return copy

    def store(self, key: str, tokens: Sequence[int], history: History, num_prompt: int) -> None:
        """Keep a finished request's history, which must not be appended to any more.

        Entries that it continues are dropped: it serves whatever they served.
        """
        assert history.num_tokens == len(tokens)
        if not tokens or history.size_bytes > self.limit_bytes:
            return
        key = f"{KEPT}{key}" if history.num_kept else key
        name = (key, np.asarray(tokens, dtype=np.int64).tobytes())
        for old in [old for old in self._entries if old[0] == key and name[1].startswith(old[1])]:
            self._drop(old)
        self._entries[name] = Entry(history, num_prompt)
        self.size_bytes += history.size_bytes
        self.resize(self.limit_bytes)

    def resize(self, limit_bytes: int) -> None:
        """Keep to this budget from now on, dropping what was used longest ago."""
        self.limit_bytes = limit_bytes
        while self.size_bytes > self.limit_bytes:
            self._drop(next(iter(self._entries)))

    def _drop(self, name: tuple[str, bytes]) -> None:
        self.size_bytes -= self._entries.pop(name).history.size_bytes


def _shared(a: NDArray[np.int64], b: NDArray[np.int64]) -> int:
    """How many leading tokens two sequences have in common."""
    length = min(len(a), len(b))
    differ = a[:length] != b[:length]
    return int(differ.argmax()) if differ.any() else length
