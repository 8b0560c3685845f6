"""The stored examples nearest to a query, found among many that were not compared."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from loramix.route.neighbours import best
from loramix.route.ngrams import Floats

COSINES = arrays(
    np.float32,
    array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=12),
    elements=st.one_of(st.just(0.0), st.floats(-1, 1, width=32)),
)


@given(COSINES, st.integers(1, 6))
def test_the_best_are_what_sorting_all_finds(cosines: Floats, count: int) -> None:
    ranked = -np.sort(-cosines, axis=1)[:, :count]
    missing = count - ranked.shape[1]
    np.testing.assert_array_equal(best(cosines, count), np.pad(ranked, ((0, 0), (0, missing))))
