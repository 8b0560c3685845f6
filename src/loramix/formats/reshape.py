"""Adapters out of adapters: a mix as one of them."""

from __future__ import annotations

from collections.abc import Iterable

from loramix.adapter import Adapter, Card
from loramix.errors import AdapterError, BaseMismatch
from loramix.formats.peft import digest
from loramix.lora import Pair, stack
from loramix.mix import check_name


def stacked(name: str, terms: Iterable[tuple[float, Adapter]], description: str = "") -> Adapter:
    """The weighted sum of adapters as one: exact, ranks add up, any layers.

    Raises AdapterError for no adapters and for DoRA, BaseMismatch if their cards name two bases.
    """
    terms = list(terms)
    if not terms:
        raise AdapterError("The mix is empty, which is the bare base: there is nothing to convert.")
    pairs: dict[str, list[tuple[float, Pair]]] = {}
    for weight, adapter in terms:
        for layer, pair in adapter.pairs.items():
            pairs.setdefault(layer, []).append((weight, pair))
    whole = {layer: stack(parts) for layer, parts in sorted(pairs.items())}
    cards = [adapter.card for _, adapter in terms]
    card = Card(
        check_name(name),
        description=description,
        base=_common([card.base for card in cards], "bases"),
        base_fingerprint=_common([card.base_fingerprint for card in cards], "base fingerprints"),
    )
    return Adapter(name, whole, digest(whole), card)


def _common(values: Iterable[str], what: str) -> str:
    known = sorted({value for value in values if value})
    if len(known) > 1:
        raise BaseMismatch(
            f"The adapters of this mix name the {what} {' and '.join(known)}; one mix is of "
            f"adapters of one base."
        )
    return known[0] if known else ""
