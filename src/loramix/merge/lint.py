"""What to know before merging: how the adapters fit each other and the base, what will be lost."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from loramix.adapter import Adapter
from loramix.base import SAMPLE
from loramix.errors import MergeError
from loramix.lora import Pair
from loramix.merge.core import Core
from loramix.merge.fold import check_alike, check_one_form
from loramix.merge.places import Place, places
from loramix.merge.recipe import Recipe
from loramix.merge.stored import Stored, StoredBase, open_stored
from loramix.merge.updates import Updates
from loramix.mix import Mix

RANKS = (4, 8, 16, 32, 64)
ROWS = 8  # of each layer that are looked at


@dataclass(frozen=True, slots=True)
class Meeting:
    """Two adapters in the layers both update, with the signs of their weights.

    `cosine` is that of all their entries. The overlaps are |U^T V|^2 / min rank of what they write
    to and read from: 1 if one's subspace lies in the other's. `conflict` is the share of entries
    with opposite signs; of unrelated updates it is a half.
    """

    names: tuple[str, str]
    num_layers: int
    cosine: float
    writes_overlap: float
    reads_overlap: float
    conflict: float


@dataclass(frozen=True, slots=True)
class Lint:
    """A report: facts, then advice."""

    num_updates: Mapping[str, int]  # each found its place
    fingerprints: Mapping[str, str]  # by adapter: same, differs, unknown
    meetings: tuple[Meeting, ...]
    kept: Mapping[int, float]  # energy of the weighted sum by rank
    lost: float | None  # |rounding| / |update| in the base's precision; None if not known
    dtype: str

    @property
    def advice(self) -> list[str]:
        """What to do about it, in sentences."""
        return list(_advice(self))


def lint(adapters: Mapping[str, Adapter], recipe: Recipe, base: str | Path | None = None) -> Lint:
    """Look before merging; the base is read in a few rows. Raises what the merge would raise."""
    sources = {name: adapters[name] for name in recipe.mix}
    check_alike(sources.values())
    layers = sorted({layer for adapter in sources.values() for layer in adapter.pairs})
    recipe.check_places(layers)
    opened = None if base is None else open_stored(base)
    if opened is None:
        check_one_form(sources.values())
    placed = None if opened is None else places(sources.values(), opened)
    mark = None if opened is None else fingerprint(opened)
    plain = [layer for layer in layers if recipe.updates(layer, sources).are_factors]
    return Lint(
        num_updates={name: len(adapter.pairs) for name, adapter in sources.items()},
        fingerprints={name: _compare(a.card.base_fingerprint, mark) for name, a in sources.items()},
        meetings=tuple(_meeting(sources, recipe.mix, *pair) for pair in combinations(sources, 2)),
        kept=_kept(recipe.updates(layer, sources) for layer in plain),
        lost=None if placed is None else _lost(sources, recipe, placed.values()),
        dtype="" if placed is None else next(iter(placed.values())).stored.kind,
    )


def trained_elsewhere(adapters: Iterable[Adapter], base: str | Path) -> list[str]:
    """Names of the adapters whose card says that they were trained on other weights."""
    wanted = {adapter.name: adapter.card.base_fingerprint for adapter in adapters}
    if not any(wanted.values()):
        return []
    found = fingerprint(open_stored(base))
    return [name for name, mark in wanted.items() if _compare(mark, found) == "differs"]


def fingerprint(base: StoredBase) -> str:
    """`base.fingerprint` of the model in these files, from their bytes: names, shapes, signs.

    The same where the files use the names of the model's own parameters, as those of nearly all
    architectures do (GPT-NeoX is one that transformers renames).
    """
    state = hashlib.sha256()
    for name, stored in sorted(base.tensors.items()):
        state.update(f"{name}{stored.shape}".encode())
        state.update(_signs(stored).tobytes())
    return state.hexdigest()[:16]


def _signs(stored: Stored) -> np.ndarray:
    """Whether each of a sample of numbers has its sign bit, the last bit in little-endian bytes."""
    size = stored.dtype.itemsize
    raw = np.memmap(stored.file, np.uint8, "r", stored.offset, stored.size_bytes)
    count = math.prod(stored.shape)
    signs: np.ndarray = raw[size - 1 :: size * max(1, count // SAMPLE)][:SAMPLE] >> 7 == 1
    return signs


def _compare(wanted: str, found: str | None) -> str:
    if not wanted or found is None:
        return "unknown"
    return "same" if wanted == found else "differs"


def _meeting(adapters: Mapping[str, Adapter], mix: Mix, *names: str) -> Meeting:
    one, two = (adapters[name] for name in names)
    turned = math.copysign(1, math.prod(mix[name] for name in names))
    shared = sorted(one.pairs.keys() & two.pairs.keys())
    inner, squares, writes, reads, opposite, count = 0.0, [0.0, 0.0], 0.0, 0.0, 0, 0
    for layer in shared:
        p, q = (adapter.pairs[layer].to(torch.float32) for adapter in (one, two))
        gram = Updates(layer, ("p", "q"), torch.ones(2), (_plain(p), _plain(q))).gram()
        inner += float(gram[0, 1])
        squares = [total + float(own) for total, own in zip(squares, gram.diagonal(), strict=True)]
        writes += _overlap(p.b, q.b)
        reads += _overlap(p.a.T, q.a.T)
        signs = (p.b[:ROWS] @ p.a) * (q.b[:ROWS] @ q.a)
        opposite, count = opposite + int((turned * signs < 0).sum()), count + signs.numel()
    num = max(1, len(shared))
    cosine = turned * inner / max(math.sqrt(squares[0] * squares[1]), 1e-300)
    return Meeting(
        (one.name, two.name),
        len(shared),
        cosine,
        writes / num,
        reads / num,
        opposite / max(1, count),
    )


def _plain(pair: Pair) -> Pair:
    """Its direction B A; a DoRA's gains need the base and are left out here."""
    return Pair(pair.a, pair.b)


def _overlap(x: Tensor, y: Tensor) -> float:
    """|U^T V|^2 / min(rank) for bases U and V of the columns."""
    u, v = torch.linalg.qr(x).Q, torch.linalg.qr(y).Q
    return float((u.T @ v).square().sum()) / min(x.shape[1], y.shape[1])


def _kept(layers: Iterable[Updates]) -> dict[int, float]:
    """Share of the energy of the weighted sums that a rank holds, over all layers."""
    spectra = []
    for updates in layers:
        core = Core.of(updates, "lint")
        merged = torch.einsum("k,kpq->pq", updates.weights.double(), core.cores)
        spectra.append(torch.linalg.svdvals(merged).square())
    whole = sum(float(s.sum()) for s in spectra)
    if not whole:
        return {}
    return {rank: sum(float(s[:rank].sum()) for s in spectra) / whole for rank in RANKS}


def _lost(adapters: Mapping[str, Adapter], recipe: Recipe, placed: Iterable[Place]) -> float | None:
    """|round(W + dW) - (W + dW)| / |dW| of the weighted sum, on a few rows of each layer.

    None where all updates are DoRA.
    """
    lost, whole = 0.0, 0.0
    for place in placed:
        updates = recipe.updates(place.layer, adapters)
        if not updates.are_factors:
            continue
        stop = min(place.start + ROWS, place.stop)
        base = place.stored.rows(place.start, stop).double()
        terms = zip(updates.weights.tolist(), updates.pairs, strict=True)
        delta = sum(
            (w * _first_rows(p, len(base), place.transposed) for w, p in terms if p),
            torch.zeros_like(base),
        )
        if not base.isfinite().all():
            raise MergeError(f"{place.stored.name} holds NaN or infinity; check the base.")
        exact = base + delta
        lost += float((exact.to(place.stored.dtype).double() - exact).square().sum())
        whole += float(delta.square().sum())
    return math.sqrt(lost / whole) if whole else None


def _first_rows(pair: Pair, count: int, transposed: bool) -> Tensor:
    """Of b @ a as it is stored, in float64."""
    a, b = pair.a.double(), pair.b.double()
    return a[:, :count].T @ b.T if transposed else b[:count] @ a


def _advice(report: Lint) -> Iterator[str]:
    for name, found in report.fingerprints.items():
        if found == "differs":
            yield (
                f"{name} was trained on other weights, or these files use older names: check that "
                f"the base is the right one."
            )
    interference = list(filter(None, map(_interference, report.meetings)))
    yield from interference
    enough = [rank for rank, share in report.kept.items() if share >= 0.99]
    if enough:
        yield f"Rank {enough[0]} holds 99 % of the sum's energy."
    if report.lost is not None and report.lost > 0.3:
        yield (
            f"Rounding to {report.dtype} loses {report.lost:.0%} of the update, entry by entry; in "
            f"outputs errors average out, and --prove says what is left: if that is too much, keep "
            f"the adapter beside the base, or merge into a float32 copy of it."
        )
    if not interference:
        yield "sum is exact and nothing speaks against it; compare others by their scores."


def _interference(met: Meeting) -> str:
    """What to try where two adapters are in each other's way; empty where they are not."""
    pair = " and ".join(met.names)
    if met.cosine < -0.1:
        return (
            f"{pair} pull in opposite directions, so any merge loses part of both: try ties, or "
            f"serve them and let a router choose."
        )
    if met.cosine > 0.5:
        return (
            f"{pair} are much alike: where weights add up to more than 1, what they share is "
            f"exaggerated; average keeps its size."
        )
    if max(met.writes_overlap, met.reads_overlap) > 0.5:
        return (
            f"{pair} write to or read from much the same subspace: compare sum with tsv-m, which "
            f"takes their directions apart, and core-ties, which settles signs there."
        )
    return ""
