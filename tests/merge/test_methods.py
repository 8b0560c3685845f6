"""What every merge method keeps, whatever it does."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loramix.errors import MergeError
from loramix.lora import Pair
from loramix.merge.methods import METHODS, find
from loramix.merge.registry import ELSEWHERE
from loramix.merge.rows import View
from loramix.merge.updates import Inputs, Updates
from tests.merge import dense
from tests.merge.layer import OUT, THREE, D, close, deltas, merged, pair, updates

IDENTITY = {"density": 1.0, "epsilon": 0.0, "gamma": 0.0}
ISOTROPIC = {"iso-c"}  # its one update is not itself, by definition
PAIRS_ONLY = {"slerp"}
ORDERED = {"lora-lego"}  # orthogonal units are as close as their negatives: a tie is broken
names = pytest.mark.parametrize("name", sorted(METHODS))


def identity(name):
    return {key: value for key, value in IDENTITY.items() if key in find(name).defaults}


@names
@settings(deadline=None, max_examples=15)
@given(rank=st.integers(1, 6), seed=st.integers(0, 99))
def test_one_update_at_weight_one_is_itself(name, rank, seed):
    one = updates((1.0, pair(rank, seed)))
    found = merged(name, one, **identity(name))
    if name in ISOTROPIC:
        values = torch.linalg.svdvals(found)[:rank]
        torch.testing.assert_close(values, values.mean().expand(rank))
    else:
        close(found, deltas(one)[0], 2e-6)


@pytest.mark.parametrize("name", sorted(METHODS.keys() - ORDERED))
@settings(deadline=None, max_examples=10)
@given(data=st.data())
def test_the_order_of_adapters_does_not_matter(name, data):
    count = 2 if name in PAIRS_ONLY else data.draw(st.integers(2, 4))
    terms = [
        (data.draw(st.floats(0.125, 2, width=32)), pair(data.draw(st.integers(1, 4)), seed))
        for seed in range(count)
    ]
    there, back = updates(*terms), updates(*terms[::-1], names="abcdefgh"[:count][::-1])
    expected = merged(name, there)
    assert (merged(name, back) - expected).norm() <= 1e-4 * expected.norm() + 1e-9


@names
def test_a_missing_layer_counts_as_zero(name):
    zero = Pair(torch.zeros(2, D), torch.zeros(OUT, 2))
    missing = updates((0.5, pair(3)), (0.5, None))
    there = updates((0.5, pair(3)), (0.5, zero))
    close(merged(name, missing), merged(name, there))


@names
def test_the_result_is_finite_at_the_bounds_of_every_setting(name):
    terms = updates((0.75, pair(3, 1)), (0.25, pair(2, 2)))
    for key in find(name).defaults:
        for value in (0.0, 1.0):
            with suppress(MergeError):
                assert merged(name, terms, **{key: value}).isfinite().all()


@names
def test_parameters_out_of_range_are_refused(name):
    for key in find(name).defaults:
        for value in (-0.5, 1.5):
            with pytest.raises(MergeError):
                merged(name, updates((1.0, pair(2, 1)), (1.0, pair(2, 2))), **{key: value})


@pytest.mark.parametrize("name", ["dare", "della-linear"])
def test_random_drops_are_right_on_average(name):
    draws = [
        merged(name, updates(*zip(THREE.weights.tolist(), THREE.pairs, strict=True), seed=seed))
        for seed in range(200)
    ]
    expected = merged("sum", THREE)
    assert (torch.stack(draws).mean(0) - expected).norm() < 0.15 * expected.norm()
    assert (draws[0] - expected).norm() > 0.5 * expected.norm()


def test_dare_keeps_entries_or_drops_them_whole():
    one = updates((1.0, THREE.pairs[0]))
    found, whole = merged("dare", one, density=0.25), deltas(one)[0]
    kept = found != 0
    torch.testing.assert_close(found[kept], 4 * whole[kept], rtol=1e-5, atol=1e-5)
    assert 0.2 < kept.float().mean() < 0.3


@pytest.mark.parametrize("block", [1, 29, 30, 64, 10**6])
def test_no_result_depends_on_how_rows_are_put_in_blocks(block, monkeypatch):
    wanted = {name: merged(name, THREE) for name in ("ties", "dare", "della", "sce")}
    monkeypatch.setattr("loramix.merge.rows.BLOCK", block)
    for name, expected in wanted.items():
        close(merged(name, THREE), expected)


@settings(deadline=None, max_examples=50)
@given(share=st.floats(0, 1), seed=st.integers(0, 99), coarse=st.booleans())
def test_a_cut_is_the_exact_order_statistic(share, seed, coarse):
    values = torch.randn(2, OUT, D, generator=torch.Generator().manual_seed(seed))
    values = (2 * values).round() if coarse else values * torch.tensor([1e-30, 1e30])[:, None, None]
    view = View("", ("a", "b"), torch.ones(2), (OUT, D), lambda i, j: values[:, i:j])
    cut = view.cut(lambda rows: rows.deltas.abs(), share)
    keep = round(share * OUT * D)
    for each, found in zip(values, cut, strict=True):
        order = each.abs().flatten().sort(descending=True).values
        assert found == (order[keep - 1] if 0 < keep < OUT * D else 0.0 if keep else torch.inf)


def test_a_dora_needs_its_base_and_then_merges_by_rows():
    plain = pair(3, 1)
    dora = Pair(plain.a, plain.b, torch.rand(OUT) + 0.5)
    weight = torch.randn(OUT, D)
    with pytest.raises(MergeError, match="--into"):
        merged("ties", updates((1.0, dora)))
    given = updates((0.5, dora), (0.5, pair(2, 2)))
    given = Updates(given.layer, given.names, given.weights, given.pairs, lambda i, j: weight[i:j])
    both = torch.stack([dora.delta(weight), pair(2, 2).delta()]).double()
    close(merged("sum", given), 0.5 * both.sum(0))
    close(merged("slerp", given), dense.slerp(both, given.weights))
    close(merged("ties", given, density=0.3), dense.ties(both, given.weights, 0.3))
    with pytest.raises(MergeError, match="DoRA"):
        merged("tsv-m", given)
    assert find("sum").apply(updates((1.0, dora))) is dora


def test_methods_say_what_they_cannot_do():
    with pytest.raises(MergeError, match="expected one of"):
        find("mean")
    for name, here in [*ELSEWHERE.items(), ("DARE_TIES", "dare-ties")]:
        with pytest.raises(MergeError, match=f"here it is {here}"):
            find(name)
        assert here.split()[0] in METHODS
    with pytest.raises(MergeError, match="karcher"):
        merged("slerp", updates(*((1.0, pair(1, n)) for n in range(3))))
    with pytest.raises(MergeError, match="negative"):
        merged("average", updates((1.0, pair(1)), (-0.5, pair(1, 1))))
    with pytest.raises(MergeError, match="with --data"):
        merged("regmean", replace(updates((1.0, pair(1))), inputs=None))
    with pytest.raises(MergeError, match="No row gave"):
        merged(
            "regmean",
            replace(
                updates((1.0, pair(1))),
                inputs=Inputs(torch.zeros(1, 1, 1).double(), torch.zeros(1, D).double()),
            ),
        )
    with pytest.raises(MergeError, match="positive"):
        merged("ties-normalised", updates((1.0, pair(1)), (-0.5, pair(1, 1))))


@pytest.mark.parametrize("name", ["karcher", "mean-direction"])
def test_directions_that_cancel_out_are_refused(name):
    one = pair(2, 1)
    with pytest.raises(MergeError, match="cancel out"):
        merged(name, updates((0.5, one), (0.5, Pair(one.a, -one.b))))


@pytest.mark.parametrize("name", ["slerp", "karcher", "mean-direction"])
def test_an_update_that_is_zero_but_for_rounding_is_no_direction(name):
    one = pair(3, 1)
    for seed in range(13, 25):
        other = pair(3, seed)
        nothing = Pair(torch.cat([other.a, other.a]), torch.cat([other.b, -other.b], dim=1))
        assert merged(name, updates((0.5, one), (0.5, nothing))).isfinite().all()


@pytest.mark.parametrize("name", ["slerp", "karcher", "mean-direction"])
@pytest.mark.parametrize("square", [0.0, -1e-9, 1e-9])  # what rounding may make of a zero
def test_the_square_of_a_zero_may_be_anything_small(name, square, monkeypatch):
    one, other = pair(3, 1), pair(3, 13)
    nothing = Pair(torch.cat([other.a, other.a]), torch.cat([other.b, -other.b], dim=1))
    given = updates((0.5, one), (0.5, nothing))
    gram = given.gram()
    gram[1, 1] = square
    monkeypatch.setattr(Updates, "gram", lambda self: gram.clone())
    assert merged(name, given).isfinite().all()


@pytest.mark.parametrize("name", ["core-dare-ties", "knots-dare-ties"])
def test_what_is_dropped_differs_between_layers(name):
    given = updates((1.0, pair(6, 1)), (1.0, pair(6, 2)))
    other = Updates("another", given.names, given.weights, given.pairs)
    close(merged(name, given), merged(name, given))
    assert (merged(name, given) - merged(name, other)).norm() > 0.1


@names
def test_every_method_names_its_paper(name):
    assert find(name).source.startswith("https://")
    assert len(find(name).summary) > 20
