"""One layer that several adapters update, at random, and what a method makes of it."""

from __future__ import annotations

import torch

from loramix.lora import Pair
from loramix.merge.methods import find
from loramix.merge.rows import combined
from loramix.merge.updates import Inputs, Updates

OUT, D = 37, 29


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
    """The update that a method makes of them, as a float64 matrix."""
    found = find(name).apply(given, **options)
    if isinstance(found, Pair):
        return found.b.double() @ found.a.double()
    return combined(given.view(), found).double()


def deltas(given):
    return torch.stack(
        [p.b.double() @ p.a.double() if p else torch.zeros(OUT, D).double() for p in given.pairs]
    )


def close(found, expected, tolerance=2e-5):
    assert (found - expected).norm() <= tolerance * expected.norm()


THREE = updates((0.5, pair(3, 1)), (0.25, pair(5, 2)), (1.5, pair(2, 3)))
