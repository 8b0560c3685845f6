"""What every merge method keeps, and each against its paper's dense form (dense.py)."""

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
from loramix.merge.rows import View, combined
from loramix.merge.updates import Inputs, Updates
from tests.merge import dense

OUT, D = 37, 29
IDENTITY = {"density": 1.0, "epsilon": 0.0, "gamma": 0.0}
ISOTROPIC = {"iso-c"}  # its one update is not itself, by definition
PAIRS_ONLY = {"slerp"}
ORDERED = {"lora-lego"}  # orthogonal units are as close as their negatives: a tie is broken
names = pytest.mark.parametrize("name", sorted(METHODS))


def pair(rank, seed=0, *, out=OUT, width=D):
    g = torch.Generator().manual_seed(seed)
    return Pair(torch.randn(rank, width, generator=g), torch.randn(out, rank, generator=g))


def rows_of(name, width=D, count=64):
    """What a layer is given while an adapter answers, [N, D]: of another shape for each of them."""
    g = torch.Generator().manual_seed(ord(name))
    x = torch.randn(count, width, generator=g, dtype=torch.float64)
    return x @ torch.randn(width, width, generator=g, dtype=torch.float64) * width**-0.5


def inputs_of(names, pairs):
    a = torch.cat([p.a.double() for p in pairs if p])
    rows = [rows_of(name, a.shape[1]) for name in names]
    gram = torch.stack([(x @ a.T).T @ (x @ a.T) / len(x) for x in rows])
    return Inputs(gram, torch.stack([x.square().mean(0) for x in rows]))


def updates(*terms, layer="model.layers.3.mlp.up_proj", seed=0, names="abcdefgh"):
    """Of (weight, pair or None), named a, b, c, ..."""
    weights = torch.tensor([weight for weight, _ in terms], dtype=torch.float64)
    names, pairs = tuple(names[: len(terms)]), tuple(each for _, each in terms)
    return Updates(layer, names, weights, pairs, seed=seed, inputs=inputs_of(names, pairs))


def merged(name, given, **options):
    """The merged update as a float64 matrix."""
    found = find(name).apply(given, **options)
    if isinstance(found, Pair):
        return found.b.double() @ found.a.double()
    return combined(given.view(), found).double()


def identity(name):
    return {key: value for key, value in IDENTITY.items() if key in find(name).defaults}


def deltas(given):
    return torch.stack(
        [p.b.double() @ p.a.double() if p else torch.zeros(OUT, D).double() for p in given.pairs]
    )


def close(found, expected, tolerance=2e-5):
    assert (found - expected).norm() <= tolerance * expected.norm()


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


@pytest.fixture(scope="module")
def three():
    return updates((0.5, pair(3, 1)), (0.25, pair(5, 2)), (1.5, pair(2, 3)))


def test_sum_and_average_are_linear(three):
    expected = dense.weighed(deltas(three), three.weights).sum(0)
    close(merged("sum", three), expected, 1e-6)
    close(merged("average", three), expected / three.weights.sum(), 1e-6)
    close(merged("weighted", three), expected, 1e-6)
    close(merged("weighted", three, normalise=1), expected / three.weights.sum(), 1e-6)


@pytest.mark.parametrize("density", [0.0, 0.01, 0.2, 0.77, 1.0])
@pytest.mark.parametrize("name", ["ties", "ties-normalised", "magnitude-prune", "sce"])
def test_entries_against_the_papers(name, density, three):
    reference = getattr(dense, name.replace("-", "_"))
    expected = reference(deltas(three), three.weights, density)
    if density == 0:
        assert merged(name, three, density=0.0).eq(0).all()
        return
    close(merged(name, three, density=density), expected)


@pytest.mark.parametrize("gamma", [0.0, 0.001, 0.1])
def test_breadcrumbs_against_the_paper(gamma, three):
    expected = dense.breadcrumbs(deltas(three), three.weights, 0.5, gamma)
    assert expected.any()  # at gamma 0 mergekit returns zeros
    close(merged("breadcrumbs", three, density=0.5, gamma=gamma), expected)


def test_spheres_against_the_papers(three):
    two = updates((0.25, pair(3, 1)), (0.5, pair(5, 2)))
    close(merged("slerp", two), dense.slerp(deltas(two), two.weights))
    close(merged("karcher", three), dense.karcher(deltas(three), three.weights))
    near = [pair(3, 1)] * 3
    near = [Pair(p.a + 0.3 * torch.randn(3, D), p.b) for p in near]
    alike = updates(*((1.0, p) for p in near))
    close(merged("model-stock", alike), dense.model_stock(deltas(alike), alike.weights))


def test_mean_direction_is_not_the_karcher_mean(three):
    one, other = merged("karcher", three), merged("mean-direction", three)
    assert one.norm().item() == pytest.approx(other.norm().item())
    assert (one - other).norm() > 0.01 * one.norm()


def test_singular_vectors_against_the_papers(three):
    ranks = [p.rank for p in three.pairs]
    close(merged("tsv-m", three), dense.tsv_m(deltas(three), three.weights, ranks))
    close(merged("iso-c", three), dense.iso_c(deltas(three), three.weights, sum(ranks)))


def test_coordinates_against_the_papers(three):
    factors = [(p.b.double(), p.a.double()) for p in three.pairs]
    expected = dense.core_ties(factors, three.weights, 0.3)
    close(merged("core-ties", three, density=0.3), expected)
    close(merged("core-sum", three), dense.core_sum(factors, three.weights))
    ranks = [p.rank for p in three.pairs]
    close(merged("core-tsv", three), dense.core_tsv(factors, three.weights, ranks))
    expected = dense.knots_ties(deltas(three), three.weights, 0.3, three.rank)
    close(merged("knots-ties", three, density=0.3), expected)


@pytest.mark.parametrize("off_diagonal", [0.0, 0.1, 0.9, 1.0])
@pytest.mark.parametrize("ranks", [(3, 5, 2), (20, 5, 9)], ids=["few", "all directions"])
def test_regmean_against_the_paper(ranks, off_diagonal):
    """As dense as in the paper; with ranks that add up to D it is the paper's own, nothing less."""
    pairs = [pair(rank, seed) for seed, rank in enumerate(ranks)]
    given = updates(*zip((0.5, 0.25, 1.5), pairs, strict=True))
    a = torch.cat([p.a for p in pairs]).double()
    seen = torch.linalg.svd(a, full_matrices=False).Vh.T
    rows = [rows_of(name) for name in given.names]
    expected = dense.regmean(deltas(given), rows, given.shares, off_diagonal, seen)
    if sum(ranks) > D:
        free = dense.regmean(deltas(given), rows, given.shares, off_diagonal, torch.eye(D).double())
        close(expected, free, 1e-9)
    close(merged("regmean", given, off_diagonal=off_diagonal), expected)


def test_regmean_is_the_average_where_rows_do_not_differ(three):
    gram, squares = three.inputs.gram[:1], three.inputs.squares[:1]
    given = replace(three, inputs=Inputs(gram.expand(3, -1, -1), squares.expand(3, -1)))
    close(merged("regmean", given), merged("average", given))
    assert (merged("regmean", three) - merged("average", three)).norm() > 0.1


def test_regmean_is_the_average_where_rows_say_nothing(three):
    """Two tokens each span few directions; in the others no update is better than another."""
    a = torch.cat([p.a.double() for p in three.pairs])
    x = torch.randn(2, D, generator=torch.Generator().manual_seed(0)).double()
    gram = (x @ a.T).T @ (x @ a.T) / 2
    given = replace(three, inputs=Inputs(gram.expand(3, -1, -1), x.square().mean(0).expand(3, -1)))
    close(merged("regmean", given, off_diagonal=1), merged("average", given), 1e-4)


@pytest.mark.parametrize("name", ["dare", "della-linear"])
def test_random_drops_are_right_on_average(name, three):
    draws = [
        merged(name, updates(*zip(three.weights.tolist(), three.pairs, strict=True), seed=seed))
        for seed in range(200)
    ]
    expected = merged("sum", three)
    assert (torch.stack(draws).mean(0) - expected).norm() < 0.15 * expected.norm()
    assert (draws[0] - expected).norm() > 0.5 * expected.norm()


def test_dare_keeps_entries_or_drops_them_whole(three):
    one = updates((1.0, three.pairs[0]))
    found, whole = merged("dare", one, density=0.25), deltas(one)[0]
    kept = found != 0
    torch.testing.assert_close(found[kept], 4 * whole[kept], rtol=1e-5, atol=1e-5)
    assert 0.2 < kept.float().mean() < 0.3


def test_lego_makes_as_many_units_as_asked_for(three):
    assert find("lora-lego").apply(three, rank=4).rank == 4
    twice = updates((0.5, pair(3, 1)), (0.5, pair(3, 1)))  # each unit there twice: clusters of two
    found = merged("lora-lego", twice, rank=3)
    expected = deltas(twice)[0] * 0.5 * 2**0.5
    close(found, expected, 1e-4)


def test_ties_on_factors_is_another_thing(three):
    """Trimming and electing on A and B apart, as PEFT's "ties" does, has little to do with it."""
    same = updates((1.0, pair(4, 1)), (1.0, pair(4, 2)))
    a = dense.ties(torch.stack([p.a.double() for p in same.pairs]), torch.ones(2), 0.5)
    b = dense.ties(torch.stack([p.b.double() for p in same.pairs]), torch.ones(2), 0.5)
    exact = merged("ties", same, density=0.5)
    assert torch.cosine_similarity((b @ a).flatten(), exact.flatten(), dim=0) < 0.6


@pytest.mark.parametrize("block", [1, 29, 30, 64, 10**6])
def test_no_result_depends_on_how_rows_are_put_in_blocks(block, three, monkeypatch):
    wanted = {name: merged(name, three) for name in ("ties", "dare", "della", "sce")}
    monkeypatch.setattr("loramix.merge.rows.BLOCK", block)
    for name, expected in wanted.items():
        close(merged(name, three), expected)


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
    one, squares = pair(3, 1), []
    for seed in range(13, 25):
        other = pair(3, seed)
        nothing = Pair(torch.cat([other.a, other.a]), torch.cat([other.b, -other.b], dim=1))
        given = updates((0.5, one), (0.5, nothing))
        squares.append(float(given.gram()[1, 1]))
        assert merged(name, given).isfinite().all()
    assert min(squares) < 0  # what rounding makes of a zero


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
