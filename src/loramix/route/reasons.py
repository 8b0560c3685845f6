"""Why a gate decided as it did: the examples and n-grams that spoke for the likeliest adapter."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from loramix.route import Near
from loramix.route.blend import Gate
from loramix.route.neighbours import Neighbours
from loramix.route.ngrams import Floats, NgramEncoder


def nearest(
    neighbours: Neighbours, adapters: Sequence[str], cosines: Floats, count: int = 2
) -> tuple[Near, ...]:
    """The stored examples most like a query, best first; `cosines` is of each, [E]."""
    best = np.argpartition(-cosines, min(count, len(cosines)) - 1)[:count]
    ranked = best[np.argsort(-cosines[best], kind="stable")]
    return tuple(
        Near(adapters[neighbours.labels[i]], neighbours.texts[i], float(cosines[i])) for i in ranked
    )


def strongest(
    gate: Gate, ngrams: NgramEncoder, query: str, winner: int, count: int = 3
) -> tuple[str, ...]:
    """The words and pairs that speak most for the winner against the mean of the others."""
    vocabulary, weights = gate.vocabulary, gate.ngrams.weights
    labels, columns = zip(*ngrams.labelled(query), strict=True)
    owner = np.repeat(np.arange(len(labels)), [len(group) for group in columns])
    places, known = vocabulary.places(np.array([c for group in columns for c in group]))
    lean = (weights[places, winner] - weights[places].mean(axis=1)) * vocabulary.idf[places]
    totals = np.bincount(owner[known], lean, minlength=len(labels))
    evidence = dict(zip(labels, totals.tolist(), strict=True))
    ranked = sorted(evidence, key=lambda label: (-evidence[label], label))
    return tuple(label for label in ranked[:count] if evidence[label] > 0)


def information(gate: Gate, ngrams: NgramEncoder, text: str) -> float:
    """How much the words of a text say by being rare among the fitted rows, in nats."""
    words = {label: found[-1] for label, found in ngrams.labelled(text) if " " not in label}
    columns = np.array(list(words.values()), np.int64)
    places, known = gate.vocabulary.places(columns)
    idf = np.full(len(columns), gate.vocabulary.rare, np.float32)
    idf[known] = gate.vocabulary.idf[places]
    return float((idf - 1).sum())


def verdict(name: str, score: float, threshold: float, target: str) -> str:
    """Why the base or not: the in-scope score, in log-odds, against the winner's threshold."""
    choice, verb = (name, "reaches") if score >= threshold else ("base", "is below")
    return f"{choice}: in-scope score {score:.2f} {verb} {threshold:.2f}, {target}"


def least_of(name: str, keep: float) -> str:
    """What a threshold stands for that an adapter's own queries have set."""
    return f"the least of {keep:.1%} of {name}'s own queries"


def said(name: str, near: Sequence[Near], strong: Sequence[str]) -> list[str]:
    found = [f"near {n.cosine:.2f} {n.adapter}: {quoted(n.text)}" for n in near]
    return [*found, f"words for {name}: {', '.join(strong)}"] if strong else found


def seam(names: Sequence[str], parts: Sequence[str]) -> str:
    """Which adapter answers which part of a query."""
    found = zip(names, parts, strict=True)
    return "two skills: " + " and ".join(f"{name} in {quoted(part)}" for name, part in found)


def quoted(text: str, width: int = 80) -> str:
    flat = " ".join(text.split())
    return repr(flat if len(flat) <= width else flat[: width - 3] + "...")
