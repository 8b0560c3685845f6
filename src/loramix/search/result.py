"""What was found, as something that serves: a mix, or one adapter stacked layer by layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from loramix.adapter import Adapter, Card
from loramix.base import Base
from loramix.errors import SearchError
from loramix.formats.peft import digest
from loramix.lora import Pair, stack
from loramix.mix import Mix
from loramix.search import Found
from loramix.search.gates import GateLoss


def as_mix(owners: Sequence[str], point: Sequence[float]) -> Mix:
    """A point with one weight per adapter."""
    return Mix(dict(zip(owners, point, strict=True)))


def refuse_dora(adapters: Iterable[Adapter]) -> None:
    """SearchError for an adapter whose weights cannot be folded into factors."""
    for adapter in adapters:
        if any(pair.magnitude is not None for pair in adapter.pairs.values()):
            raise SearchError(
                f"{adapter.name!r} is a DoRA, which is no sum of factors: it cannot be stacked "
                f"layer by layer; leave it out, or search without --per-layer."
            )


def stacked(loss: GateLoss, base: Base, name: str, found: Found) -> Adapter:
    """One adapter with the found weights inside its B's: exact, with the ranks added up.

    For a point with a weight per adapter and layer. Weights of zero leave their factors out.
    """
    refuse_dora(loss.adapters)
    pairs_of = {adapter.name: adapter.pairs for adapter in loss.adapters}
    terms: dict[str, list[tuple[float, Pair]]] = defaultdict(list)
    for owner, layer, weight in zip(loss.owners, loss.layers, found.point, strict=True):
        if weight:
            terms[layer].append((weight, pairs_of[owner][layer].to(base.dtype)))
    if not terms:
        raise SearchError("The best of all weights are zeros: the base itself; nothing to write.")
    pairs = {layer: stack(each) for layer, each in terms.items()}
    return Adapter(name, pairs, digest(pairs), _card(loss, base, name, found))


def _card(loss: GateLoss, base: Base, name: str, found: Found) -> Card:
    parts = [adapter.card for adapter in loss.adapters]
    licences = {card.licence for card in parts}
    return Card(
        name,
        description=f"Weights per layer over {', '.join(card.name for card in parts)}, searched.",
        skills=tuple(dict.fromkeys(skill for card in parts for skill in card.skills)),
        base=base.id,
        base_fingerprint=base.fingerprint,
        licence=licences.pop() if len(licences) == 1 else "",
        scores={
            "heldout_loss": round(found.loss, 4),
            "heldout_rows": found.num_rows[2],
            f"heldout_loss_{found.start}": round(found.start_loss, 4),
        },
    )
