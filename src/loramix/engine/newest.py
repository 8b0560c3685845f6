"""Attention of the newest tokens of all requests in one call (native/attend.c)."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from loramix.native import Native

WIDEST = 256  # numbers of a head, in whole instructions of 32


def can_attend(query: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether the function knows such heads: query [1, H, N, D], keys and values [1, H', S, D]."""
    width = query.shape[-1]
    fits = width % 32 == 0 and width <= WIDEST and query.stride(3) == 1
    same = width == keys.shape[3] == values.shape[3]
    return fits and same and query.dtype == keys.dtype == values.dtype == torch.bfloat16


def attend_alone(
    native: Native,
    query: Tensor,
    spans: Sequence[tuple[int, Tensor, Tensor]],
    scale: float,
    result: Tensor,
) -> None:
    """Each span's row of the query over its keys and values, into the same row of the result.

    query [1, H, N, D], a span's keys and values [1, H', S, D], result [1, N, H, D]. Heads may lie
    apart, the tokens of one lie side by side (cache.py).
    """
    told = array("q")
    for row, keys, values in spans:
        told.extend((row, keys.shape[2], keys.data_ptr(), values.data_ptr()))
        told.extend((keys.stride(1), values.stride(1)))
    _, heads, _, width = query.shape
    native.attend(
        query.data_ptr(),
        result.data_ptr(),
        told.buffer_info()[0],
        len(spans),
        heads,
        spans[0][1].shape[1],
        width,
        query.stride(2),
        query.stride(1),
        scale,
        torch.get_num_threads(),
    )
