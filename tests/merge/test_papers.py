"""Every merge method against its paper, written on dense float64 matrices (dense.py)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from loramix.lora import Pair
from loramix.merge.methods import METHODS, find
from loramix.merge.rows import Rows
from loramix.merge.rows import dense as view_of
from loramix.merge.updates import Inputs
from tests.merge import dense
from tests.merge.layer import THREE, D, close, deltas, merged, pair, rows_of, updates

TWO = updates((0.25, pair(3, 1)), (0.5, pair(5, 2)))


def near(one, seed, by):
    """An update not far from another."""
    g = torch.Generator().manual_seed(seed)
    return Pair(one.a + by * torch.randn(*one.a.shape, generator=g), one.b)


ALIKE = updates(*((1.0, near(pair(3, 1), seed, 0.3)) for seed in range(3)))
TWINS = updates((0.5, pair(2, 1)), (0.4, near(pair(2, 1), 0, 0.1)))
GIVEN = {"slerp": TWO, "model-stock": ALIKE, "lora-lego": TWINS}


def factors(given):
    return [(p.b.double(), p.a.double()) for p in given.pairs]


def ranks(given):
    return [p.rank for p in given.pairs]


def drawn(given, *shape):
    """The numbers that decide what is dropped, for matrices of this shape."""
    zeros = torch.zeros(len(given.pairs), *shape)
    view = view_of(zeros, given.weights, given.names, layer=given.layer, seed=given.seed)
    return view.uniform(Rows(zeros, 0)).double()


def drawn_for_cores(given):
    """Core space has its basis in any order; ours begins with the smallest singular vectors."""
    return drawn(given, given.rank, given.rank).flip(1, 2)


def seen(given):
    """All directions [D, R] that adapters read."""
    a = torch.cat([p.a for p in given.pairs]).double()
    return torch.linalg.svd(a, full_matrices=False).Vh.T


def dense_sum(given):
    return dense.weighed(deltas(given), given.weights).sum(0)


def on_deltas(reference):
    return lambda given, **options: reference(deltas(given), given.weights, **options)


def with_chance(reference):
    return lambda given, **options: reference(
        deltas(given), given.weights, **options, drawn=drawn(given, *given.shape)
    )


REFERENCES = {
    "sum": dense_sum,
    "average": lambda g: dense_sum(g) / g.weights.sum(),
    "weighted": lambda g, normalise: dense_sum(g) / (g.weights.sum() if normalise else 1),
    "slerp": on_deltas(dense.slerp),
    "karcher": on_deltas(dense.karcher),
    "mean-direction": on_deltas(dense.mean_direction),
    "model-stock": on_deltas(dense.model_stock),
    "magnitude-prune": on_deltas(dense.magnitude_prune),
    "ties": on_deltas(dense.ties),
    "ties-normalised": on_deltas(dense.ties_normalised),
    "breadcrumbs": on_deltas(dense.breadcrumbs),
    "sce": on_deltas(dense.sce),
    "dare": with_chance(dense.dare),
    "dare-ties": with_chance(dense.dare_ties),
    "della": with_chance(dense.della),
    "della-linear": with_chance(dense.della_linear),
    "tsv-m": lambda g, density: dense.tsv_m(
        deltas(g), g.weights, [round(density * r) for r in ranks(g)]
    ),
    "iso-c": lambda g: dense.iso_c(deltas(g), g.weights, g.rank),
    "core-sum": lambda g: dense.core_sum(factors(g), g.weights),
    "core-tsv": lambda g, density: dense.core_tsv(
        factors(g), g.weights, [round(density * r) for r in ranks(g)]
    ),
    "core-ties": lambda g, density: dense.core_ties(factors(g), g.weights, density),
    "core-dare-ties": lambda g, density: dense.core_dare_ties(
        factors(g), g.weights, density, drawn_for_cores(g)
    ),
    "knots-ties": lambda g, density: dense.knots_ties(deltas(g), g.weights, density, g.rank),
    "knots-dare-ties": lambda g, density: dense.knots_dare_ties(
        deltas(g), g.weights, density, g.rank, drawn(g, g.rank, D)
    ),
    "lora-lego": lambda g, rank: dense.lora_lego(factors(g), g.weights, int(rank)),
    "regmean": lambda g, off_diagonal: dense.regmean(
        deltas(g), [rows_of(name) for name in g.names], g.shares, off_diagonal, seen(g)
    ),
}
SETTINGS = {
    "weighted": [{"normalise": 0}, {"normalise": 1}],
    "breadcrumbs": [{"density": 0.5, "gamma": gamma} for gamma in (0.0, 0.001, 0.1)],
    "della": [{"density": 0.5, "epsilon": 0.1}, {"density": 0.3, "epsilon": 0.25}],
    "della-linear": [{"density": 0.5, "epsilon": 0.1}, {"density": 0.3, "epsilon": 0.25}],
    "lora-lego": [{"rank": 2}, {"rank": 3}],
    "regmean": [{"off_diagonal": share} for share in (0.0, 0.1, 0.9, 1.0)],
}
DENSITIES = [{"density": density} for density in (0.01, 0.2, 0.5, 0.77, 1.0)]


def cases():
    for name in METHODS:
        default = DENSITIES if "density" in find(name).defaults else [{}]
        yield from ((name, options) for options in SETTINGS.get(name, default))


@pytest.mark.parametrize(("name", "options"), list(cases()), ids=str)
def test_a_method_is_what_its_paper_says(name, options):
    assert options.keys() == find(name).defaults.keys()
    given = GIVEN.get(name, THREE)
    expected = REFERENCES[name](given, **options)
    assert expected.dtype == torch.float64
    close(merged(name, given, **options), expected, 1e-4 if name == "lora-lego" else 2e-5)


@pytest.mark.parametrize("name", ["ties", "ties-normalised", "magnitude-prune", "sce"])
def test_a_density_of_zero_keeps_nothing(name):
    assert merged(name, THREE, density=0.0).eq(0).all()


def test_outliers_are_dropped_only_if_a_share_of_them_is():
    """With gamma 0, or less than an entry's worth, mergekit's breadcrumbs returns zeros."""
    assert merged("breadcrumbs", THREE, density=0.5, gamma=0.0).any()
    assert merged("breadcrumbs", THREE, density=0.5, gamma=1e-5).any()


def test_mean_direction_is_not_the_karcher_mean():
    one, other = merged("karcher", THREE), merged("mean-direction", THREE)
    assert one.norm().item() == pytest.approx(other.norm().item())
    assert (one - other).norm() > 0.01 * one.norm()


def test_ties_on_factors_is_another_thing():
    """Trimming and electing on A and B apart, as PEFT's "ties" does, has little to do with it."""
    same = updates((1.0, pair(4, 1)), (1.0, pair(4, 2)))
    a = dense.ties(torch.stack([p.a.double() for p in same.pairs]), torch.ones(2), 0.5)
    b = dense.ties(torch.stack([p.b.double() for p in same.pairs]), torch.ones(2), 0.5)
    exact = merged("ties", same, density=0.5)
    assert torch.cosine_similarity((b @ a).flatten(), exact.flatten(), dim=0) < 0.6


def test_a_sum_of_factors_is_another_thing():
    """Adding A's and B's apart, as PEFT's and LoRAX's "linear" do, leaves cross terms."""
    same = updates((0.5, pair(4, 1)), (0.5, pair(4, 2)))
    (one, two), root = same.pairs, 0.5**0.5
    linear = (root * (one.b + two.b) @ (root * (one.a + two.a))).double()
    exact = merged("sum", same)
    assert (linear - exact).norm() > 0.5 * exact.norm()


@pytest.mark.parametrize("off_diagonal", [0.1, 0.9, 1.0])
def test_regmean_is_the_papers_own_where_adapters_read_all_directions(off_diagonal):
    given = updates((0.5, pair(20, 0)), (0.25, pair(5, 1)), (1.5, pair(9, 2)))
    rows = [rows_of(name) for name in given.names]
    everything = torch.eye(D).double()
    expected = dense.regmean(deltas(given), rows, given.shares, off_diagonal, everything)
    close(merged("regmean", given, off_diagonal=off_diagonal), expected)


def test_regmean_is_the_average_where_rows_do_not_differ():
    gram, squares = THREE.inputs.gram[:1], THREE.inputs.squares[:1]
    given = replace(THREE, inputs=Inputs(gram.expand(3, -1, -1), squares.expand(3, -1)))
    close(merged("regmean", given), merged("average", given))
    assert (merged("regmean", THREE) - merged("average", THREE)).norm() > 0.1


def test_regmean_is_the_average_where_rows_say_nothing():
    """Two tokens each span few directions; in the others no update is better than another."""
    a = torch.cat([p.a.double() for p in THREE.pairs])
    x = torch.randn(2, D, generator=torch.Generator().manual_seed(0)).double()
    gram = (x @ a.T).T @ (x @ a.T) / 2
    given = replace(THREE, inputs=Inputs(gram.expand(3, -1, -1), x.square().mean(0).expand(3, -1)))
    close(merged("regmean", given, off_diagonal=1), merged("average", given), 1e-4)


def test_lego_makes_as_many_units_as_asked_for():
    assert find("lora-lego").apply(THREE, rank=4).rank == 4
    twice = updates((0.5, pair(3, 1)), (0.5, pair(3, 1)))  # each unit there twice: clusters of two
    found = merged("lora-lego", twice, rank=3)
    close(found, deltas(twice)[0] * 0.5 * 2**0.5, 1e-4)
