"""Attention of newest tokens in one call: softmax in float64, whatever the heads and lengths."""

import pytest
import torch
from torch import nn

from loramix.engine.attention import Span, StepCache, attend
from loramix.engine.cache import History
from loramix.engine.newest import attend_alone, can_attend
from loramix.tiles import Tiler
from tests.test_tiles import needs_tiles

BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def native():
    return Tiler().native


def drawn(*shape, size=1.0):
    return (torch.randn(shape) * size).to(BF16)


def plain(query, keys, values, scale):
    """One row [1, H, 1, D] over [1, H', S, D], in float64: [1, 1, H, D]"""
    query, keys, values = (t.double() for t in (query, keys, values))
    shares = query.shape[1] // keys.shape[1]
    keys, values = (t.repeat_interleave(shares, dim=1) for t in (keys, values))
    weights = (query @ keys.transpose(2, 3) * scale).softmax(-1)
    return (weights @ values).transpose(1, 2)


HEADS = [(16, 8, 128), (14, 2, 64), (8, 1, 256), (4, 4, 32), (7, 7, 96), (12, 2, 64)]


@needs_tiles
@pytest.mark.parametrize(("heads", "key_heads", "width"), HEADS)
@pytest.mark.parametrize("size", [0.1, 1.0, 30.0])  # of the products: flat, usual, all on one
def test_results_are_right_to_rounding(native, heads, key_heads, width, size):
    torch.manual_seed(heads)
    lengths = [1, 2, 15, 16, 17, 63, 64, 65, 200, 1000]
    query = drawn(1, len(lengths), heads, width, size=size).transpose(1, 2)
    result = torch.full((1, len(lengths), heads, width), torch.nan, dtype=BF16)
    spans = []
    for row, length in enumerate(lengths):
        keys, values = (drawn(1, key_heads, length + 9, width) for _ in "kv")
        spans.append((row, keys[:, :, 5 : 5 + length], values[:, :, 3 : 3 + length]))
    attend_alone(native, query, spans[::-1], width**-0.5, result)
    for row, keys, values in spans:
        wanted = plain(query[:, :, row : row + 1], keys, values, width**-0.5)
        torch.testing.assert_close(
            result[:, row : row + 1].double(), wanted, rtol=2**-7, atol=2**-9
        )


@needs_tiles
def test_a_row_is_the_same_bit_for_bit_whatever_is_beside_it(native):
    query, result = drawn(1, 8, 5, 64), torch.empty(1, 5, 8, 64, dtype=BF16)
    spans = [(n, drawn(1, 2, 40 * n + 1, 64), drawn(1, 2, 40 * n + 1, 64)) for n in range(5)]
    attend_alone(native, query, spans, 0.1, result)
    for span in spans:
        alone = torch.empty_like(result)
        attend_alone(native, query, [span], 0.1, alone)
        assert torch.equal(alone[:, span[0]], result[:, span[0]])


def test_heads_it_does_not_know_are_left_to_torch():
    def known(width, values_width=None, dtype=BF16):
        query, keys = (torch.zeros(1, 2, 3, width, dtype=dtype) for _ in "qk")
        return can_attend(query, keys, torch.zeros(1, 2, 3, values_width or width, dtype=dtype))

    assert known(64)
    assert not known(80)
    assert not known(512)
    assert not known(64, values_width=32)
    assert not known(64, dtype=torch.float32)
    assert not can_attend(*(torch.zeros(1, 2, 64, 64, dtype=BF16).mT for _ in "qkv"))


@needs_tiles
@pytest.mark.parametrize("window", [None, 1, 3, 50])
@pytest.mark.parametrize("softcap", [None, 0.7])
def test_a_step_of_prompts_and_newest_tokens_is_as_without(native, window, softcap):
    torch.manual_seed(0)
    sizes, step = [9, 4, 1, 70], [1, 3, 1, 1]
    before = [drawn(1, 2, size, 64) for size in sizes]
    query, keys, values = (drawn(1, heads, sum(step), 64) for heads in (4, 2, 2))

    def attended(native):
        spans, start = [], 0
        for old, count in zip(before, step, strict=True):
            history = History()
            history.append(0, old, old)
            history.advance(old.shape[2])
            spans.append(Span(start, start + count, history))
            start += count
        seen, same = StepCache(spans, native).update(keys, values, 0)
        row, _ = attend(
            nn.Identity(), query, seen, same, None, sliding_window=window, softcap=softcap
        )
        return row.float()

    torch.testing.assert_close(attended(native), attended(None), rtol=2**-6, atol=2**-7)
