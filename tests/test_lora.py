import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loramix.errors import AdapterError
from loramix.lora import Pair, compress, dora_gain, stack

D, OUT = 12, 10
ranks = st.integers(1, 6)
weights = st.floats(-3, 3, width=32)


def pair(rank, seed=0, *, dora=False):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    return Pair(draw(rank, D), draw(OUT, rank), draw(OUT).abs() if dora else None)


@settings(deadline=None)
@given(st.lists(st.tuples(weights, ranks), min_size=1, max_size=4))
def test_stack_is_the_exact_sum(terms):
    pairs = [pair(rank, seed) for seed, (_, rank) in enumerate(terms)]
    stacked = stack((weight, p) for (weight, _), p in zip(terms, pairs, strict=True))
    expected = sum(weight * p.delta() for (weight, _), p in zip(terms, pairs, strict=True))
    torch.testing.assert_close(stacked.delta(), expected)
    assert stacked.rank == sum(rank for _, rank in terms)


def test_averaging_a_and_b_apart_is_not():
    p, q = pair(4, 1), pair(4, 2)
    apart = Pair(0.5 * p.a + 0.5 * q.a, 0.5 * p.b + 0.5 * q.b).delta()
    exact = 0.5 * p.delta() + 0.5 * q.delta()
    assert (apart - exact).norm() / exact.norm() > 0.5
    halved = Pair(0.5 * p.a, 0.5 * p.b).delta()
    torch.testing.assert_close(halved, 0.25 * p.delta())


def test_what_has_no_sum_of_factors_is_not_stacked():
    with pytest.raises(AdapterError, match="no adapters"):
        stack([])
    with pytest.raises(AdapterError, match="DoRA"):
        stack([(1.0, pair(2)), (1.0, pair(2, dora=True))])


@settings(deadline=None)
@given(rank=st.integers(1, 8), kept=st.integers(1, 99))
def test_compress_is_the_truncated_svd(rank, kept):
    p = pair(rank)
    u, s, vt = torch.linalg.svd(p.delta(), full_matrices=False)
    compressed = compress(p, kept)
    torch.testing.assert_close(compressed.delta(), u[:, :kept] * s[:kept] @ vt[:kept])
    assert compressed.rank == min(rank, kept)


def test_a_stack_compresses_without_loss_to_the_rank_it_has():
    p, q = pair(2, 1), pair(3, 2)
    stacked = stack([(0.3, p), (-2.0, q), (0.7, p)])
    torch.testing.assert_close(compress(stacked, 5).delta(), stacked.delta())


@pytest.mark.parametrize("rank", [0, -1])
def test_a_rank_is_at_least_one(rank):
    with pytest.raises(AdapterError, match="at least 1"):
        compress(pair(2), rank)


def test_a_dora_update_keeps_the_directions_and_sets_the_lengths():
    weight = torch.randn(OUT, D, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    p = pair(2, dora=True)
    adapted = weight + p.delta(weight)
    torch.testing.assert_close(adapted.norm(dim=1), p.magnitude, rtol=1e-6, atol=1e-6)
    plain = weight + p.b @ p.a
    cosines = torch.nn.functional.cosine_similarity(adapted, plain)
    torch.testing.assert_close(cosines, torch.ones(OUT, dtype=torch.float64))
    assert dora_gain(p, weight).dtype == torch.float32
    with pytest.raises(AdapterError, match="base weight"):
        p.delta()


def test_dora_at_its_start_is_no_update():
    weight = torch.randn(OUT, D, dtype=torch.float64)
    start = Pair(torch.randn(2, D).double(), torch.zeros(OUT, 2).double(), weight.norm(dim=1))
    torch.testing.assert_close(start.delta(weight), torch.zeros_like(weight), rtol=0, atol=1e-6)


def test_a_pair_moves_with_its_magnitude():
    moved = pair(2, dora=True).to(torch.bfloat16)
    assert {moved.a.dtype, moved.b.dtype, moved.magnitude.dtype} == {torch.bfloat16}
    assert pair(3).to(torch.float32).magnitude is None
    torch.testing.assert_close(pair(3).to(torch.float32).delta(), pair(3).delta().float())
