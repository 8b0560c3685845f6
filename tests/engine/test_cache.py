"""Histories grow without losing a token; the cache stays within its bytes and within its keys."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from loramix.engine.cache import History, PrefixCache


def history_of(tokens, layers=2):
    """A history whose keys are the tokens, and whose values their negatives."""
    history = History()
    row = torch.tensor(tokens, dtype=torch.float32).view(1, 1, -1, 1).expand(1, 2, -1, 4)
    for layer in range(layers):
        history.append(layer, row, -row)
    history.advance(len(tokens))
    return history


def tokens_of(history, layer=0):
    none = torch.empty(1, 2, 0, 4)
    if not history.num_tokens:
        return []
    keys, values = history.append(layer, none, none)
    assert torch.equal(keys, -values)
    return keys[0, 1, :, 3].int().tolist()


@given(st.lists(st.integers(1, 90), min_size=1, max_size=6))
def test_appended_chunks_come_back_whole(sizes):
    history, rows = History(), torch.randn(1, 2, sum(sizes), 4)
    done = 0
    for size in sizes:
        chunk = rows[:, :, done : done + size]
        keys, values = history.append(0, chunk, 2 * chunk)
        done += size
        assert torch.equal(keys, rows[:, :, :done])
        assert torch.equal(values, 2 * rows[:, :, :done])
        history.advance(size)
    assert history.num_tokens == done


def test_buffers_double_so_that_growing_is_rare():
    history, one, moves, last = History(), torch.ones(1, 1, 1, 1), 0, None
    for _ in range(1000):
        keys, _ = history.append(0, one, one)
        history.advance(1)
        moves += keys.data_ptr() != last
        last = keys.data_ptr()
    assert moves <= 5
    assert history.size_bytes <= 2 * 4 * 2 * 1000


def test_a_step_that_failed_is_written_over():
    history = history_of([1, 2, 3], layers=1)
    lost = torch.zeros(1, 2, 2, 4)
    history.append(0, lost, lost)
    assert tokens_of(history) == [1, 2, 3]


token_lists = st.lists(st.integers(0, 3), min_size=1, max_size=8)
keyed = st.tuples(st.sampled_from(["base", "a", "a:0.5"]), token_lists)


@given(st.lists(keyed, max_size=8), keyed)
def test_the_longest_prefix_of_the_same_key_is_found(stored, asked):
    cache = PrefixCache(1 << 30)
    for key, tokens in stored:
        cache.store(key, tokens, history_of(tokens), 1)
    key, tokens = asked
    lengths = [0]
    for other, seen in stored:
        if other == key:
            pairs = zip(tokens, seen, strict=False)
            same = [x == y for x, y in pairs]
            lengths.append(same.index(False) if False in same else len(same))
    found = cache.longest(key, tokens)
    assert found.num_tokens == max(lengths)
    assert tokens_of(found) == tokens[: max(lengths)]


@given(st.lists(keyed, max_size=20), st.integers(0, 20))
def test_the_budget_holds_and_the_newest_survive(stored, room):
    size = history_of([0]).size_bytes
    cache = PrefixCache(room * size)
    for key, tokens in stored:
        cache.store(key, tokens, history_of(tokens), 1)
        assert cache.size_bytes == len(cache) * size <= cache.limit_bytes
    if stored and room:
        key, tokens = stored[-1]
        assert cache.longest(key, tokens).num_tokens == len(tokens)


def test_what_was_used_last_is_evicted_last():
    cache = PrefixCache(2 * history_of([0]).size_bytes)
    cache.store("base", [1, 2], history_of([1, 2]), 1)
    cache.store("base", [3, 4], history_of([3, 4]), 1)
    cache.longest("base", [1, 2])
    cache.store("base", [5, 6], history_of([5, 6]), 1)
    assert [cache.longest("base", [t, t + 1]).num_tokens for t in (1, 3, 5)] == [2, 0, 2]


def test_a_continued_conversation_replaces_its_beginning():
    cache = PrefixCache(1 << 30)
    cache.store("base", [1, 2], history_of([1, 2]), 1)
    cache.store("a", [1, 2], history_of([1, 2]), 1)
    cache.store("base", [1, 2, 3], history_of([1, 2, 3]), 1)
    assert len(cache) == 2


def test_a_prefix_can_be_continued_without_touching_the_stored():
    cache = PrefixCache(1 << 30)
    cache.store("base", [1, 2, 3], history_of([1, 2, 3]), 1)
    copy = cache.longest("base", [1, 2, 9])
    new = torch.full((1, 2, 1, 4), 9.0)
    copy.append(0, new, -new)
    copy.advance(1)
    assert tokens_of(copy) == [1, 2, 9]
    assert tokens_of(cache.longest("base", [1, 2, 3])) == [1, 2, 3]


def test_kept_history_is_an_earlier_turn_whatever_its_key():
    cache = PrefixCache(1 << 30)
    cache.store("a", [1, 2, 3, 4], history_of([1, 2, 3, 4]), 3)
    asked = [1, 2, 3, 4, 5]
    assert cache.longest("b", asked).num_tokens == 0
    kept = cache.longest("b", asked, keep=True)
    assert (kept.num_tokens, kept.num_kept) == (4, 4)
    assert cache.longest("b", [1, 2, 3, 9], keep=True).num_tokens == 0  # its prompt alone: no turn
    exact = cache.longest("a", asked, keep=True)
    assert (exact.num_tokens, exact.num_kept) == (4, 0)


def test_what_was_kept_is_never_taken_for_exact():
    cache = PrefixCache(1 << 30)
    cache.store("a", [1, 2], history_of([1, 2]), 1)
    kept = cache.longest("b", [1, 2, 3, 4], keep=True)
    kept.append(0, torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1, 4))
    kept.advance(1)
    cache.store("b", [1, 2, 3], kept, 2)
    assert cache.longest("b", [1, 2, 3, 4]).num_tokens == 0
    assert cache.longest("b", [1, 2, 3, 4], keep=True).num_kept == 3
    cache.store("b", [1, 2, 3], history_of([1, 2, 3]), 1)
    best = cache.longest("b", [1, 2, 3, 4], keep=True)
    assert (best.num_tokens, best.num_kept) == (3, 0)
