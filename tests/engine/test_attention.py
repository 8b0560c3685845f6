"""The packed row against plain attention, and the model left as it was."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from loramix.engine.attention import Seen, Span, StepCache, attend, configs, packed
from loramix.engine.cache import History
from loramix.errors import EngineError
from tests.tiny import tiny_model

HEADS, KEY_HEADS, WIDTH = 4, 2, 8


def plain(query, keys, values, window, softcap):
    """Causal attention of a whole sequence with itself, written out."""
    keys, values = (t.repeat_interleave(HEADS // KEY_HEADS, dim=1) for t in (keys, values))
    products = query @ keys.transpose(2, 3) * WIDTH**-0.5
    if softcap:
        products = softcap * torch.tanh(products / softcap)
    rows, columns = torch.arange(query.shape[2])[:, None], torch.arange(query.shape[2])[None]
    seen = (columns <= rows) & (columns > rows - (window or 10**6))
    return products.masked_fill(~seen, -torch.inf).softmax(-1) @ values


@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("window", [None, 1, 3, 50])
def test_chunks_of_packed_requests_equal_whole_sequences(window, softcap):
    torch.manual_seed(0)
    sizes = [9, 4, 1]
    full = [
        [torch.randn(1, heads, size, WIDTH) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
        for size in sizes
    ]
    histories = [History() for _ in sizes]
    results = [[] for _ in sizes]
    for step in ([4, 1, 1], [1, 2, 0], [4, 1, 0]):
        spans, chunks, start = [], [], 0
        for number, count in enumerate(step):
            if count:
                first = histories[number].num_tokens
                spans.append(Span(start, start + count, histories[number]))
                chunks.append([t[:, :, first : first + count] for t in full[number]])
                start += count
        query, keys, values = (torch.cat(parts, dim=2) for parts in zip(*chunks, strict=True))
        seen, same = StepCache(spans).update(keys, values, 0)
        row, _ = attend(
            nn.Identity(), query, seen, same, None, sliding_window=window, softcap=softcap
        )
        for span in spans:
            span.history.advance(span.num_rows)
            results[histories.index(span.history)].append(row[:, span.start : span.end])
    for tensors, result in zip(full, results, strict=True):
        wanted = plain(*tensors, window, softcap).transpose(1, 2)
        torch.testing.assert_close(torch.cat(result, dim=1), wanted)


@pytest.mark.parametrize("extra", ["attention_mask", "s_aux", "position_bias"])
def test_what_is_not_causal_attention_is_refused(extra):
    seen = Seen([], [])
    options = {"attention_mask": None, extra: torch.ones(1)}
    with pytest.raises(EngineError, match="Identity needs more than causal attention"):
        attend(nn.Identity(), torch.ones(1, 1, 1, 8), seen, seen, **options)


def test_the_model_is_packed_for_the_call_only():
    model = tiny_model()
    before = model.config._attn_implementation
    with packed(configs(model)):
        assert model.model.layers[0].self_attn.config._attn_implementation == "loramix"
    assert model.config._attn_implementation == before


def test_a_decode_step_reads_only_the_window():
    keys = torch.randn(1, KEY_HEADS, 10, WIDTH)
    history = History()
    history.append(0, keys[:, :, :9], keys[:, :, :9])
    history.advance(9)
    seen, _ = StepCache([Span(0, 1, history)]).update(keys[:, :, 9:], keys[:, :, 9:], 0)
    query = torch.randn(1, KEY_HEADS, 1, WIDTH)
    row, _ = attend(nn.Identity(), query, seen, seen, None, sliding_window=4)
    wanted = F.scaled_dot_product_attention(query, keys[:, :, 6:], keys[:, :, 6:])
    torch.testing.assert_close(row, wanted.transpose(1, 2))
