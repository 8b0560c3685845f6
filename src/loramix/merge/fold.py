"""A mix of adapters as one adapter, from their factors alone: no base is opened."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loramix.adapter import Adapter, Card
from loramix.errors import BaseMismatch, MergeError
from loramix.formats import peft
from loramix.formats.aside import aside
from loramix.formats.card import write_card
from loramix.formats.folder import RECIPE
from loramix.formats.licences import strictest
from loramix.lora import Pair
from loramix.merge.core import WHOLE, Size, approximated, resized
from loramix.merge.recipe import Recipe
from loramix.mix import slug

_ROOT = re.compile(r".*?\.(?=\d+\.)")  # "model.layers." of the name of a layer in a block


@dataclass(frozen=True, slots=True)
class Merged:
    """An adapter made of several, and how much of the merged update it holds.

    `kept` is the share of the squared Frobenius norm, by layer: 1 unless a rank was asked for, or
    the method has no factors.
    """

    adapter: Adapter
    recipe: Recipe
    sources: Mapping[str, Adapter]
    kept: Mapping[str, float]

    @property
    def least_kept(self) -> tuple[str, float]:
        """The layer that lost most."""
        return min(self.kept.items(), key=lambda item: item[1])

    def save(self, folder: str | Path, *, replace: bool = False) -> None:
        """Write a PEFT folder with a card and `merge.json`, whole or not at all."""
        with aside(Path(folder), replace=replace) as place:
            peft.write(self.adapter, place)
            write_card(self.adapter.card, place)
            write_recipe(place, self.recipe, self.sources, kept=dict(self.kept))


def merge_adapters(
    adapters: Mapping[str, Adapter], recipe: Recipe, size: Size = WHOLE, *, name: str = "merged"
) -> Merged:
    """The adapters of the recipe's mix as one, in float32.

    Methods that keep factors are exact at the rank they have: `size` compresses them optimally.
    The others need a rank (the sum of ranks if none is given) and lose what does not fit into it.
    Raises BaseMismatch if the adapters are of several bases, MergeError for what has no exact form.
    """
    check_alike(adapters[name] for name in recipe.mix)
    check_one_form(adapters[name] for name in recipe.mix)
    layers = sorted({layer for each in recipe.mix for layer in adapters[each].pairs})
    recipe.check_places(layers)
    pairs, kept = {}, {}
    for layer in layers:
        pairs[layer], kept[layer] = _merged(layer, adapters, recipe, size)
    if not any(pair.a.any() and pair.b.any() for pair in pairs.values()):
        raise MergeError(f"{recipe.method} of {recipe.mix} cancels out to nothing in every layer.")
    card = merged_card(slug(name), recipe, [adapters[each].card for each in recipe.mix])
    made = Adapter(card.name, pairs, peft.digest(pairs), card)
    return Merged(made, recipe, {each: adapters[each] for each in recipe.mix}, kept)


def check_alike(adapters: Iterable[Adapter]) -> None:
    """BaseMismatch unless all updates of a layer have one shape, and all cards one base."""
    shapes: dict[str, tuple[tuple[int, int], str]] = {}
    bases: dict[str, str] = {}
    for adapter in adapters:
        if adapter.card.base_fingerprint:
            bases.setdefault(adapter.card.base_fingerprint, adapter.name)
        for layer, pair in adapter.pairs.items():
            shape = (pair.b.shape[0], pair.a.shape[1])
            known, other = shapes.setdefault(layer, (shape, adapter.name))
            if known != shape:
                raise BaseMismatch(
                    f"{layer} is {list(known)} in {other!r} and {list(shape)} in {adapter.name!r}: "
                    f"they are for different bases; merge adapters of one base."
                )
    if len(bases) > 1:
        raise BaseMismatch(
            f"{' and '.join(map(repr, bases.values()))} were trained on bases with different "
            f"weights ({', '.join(bases)}); merge adapters of one base."
        )


def check_one_form(adapters: Iterable[Adapter]) -> None:
    """BaseMismatch if the adapters call the blocks of their bases by names of which none is shared.

    A base that is opened settles which form is meant; without one, nothing can hold both.
    """
    first, roots = "", set[str]()
    for adapter in adapters:
        own = {match[0] for match in map(_ROOT.match, adapter.pairs) if match}
        if own and roots and not own & roots:
            raise BaseMismatch(
                f"{first!r} updates {min(roots)}0 and so on, {adapter.name!r} {min(own)}0: they "
                f"are for different bases, or forms of one; merge adapters of one base."
            )
        first, roots = first or adapter.name, roots | own


def merged_card(name: str, recipe: Recipe, cards: list[Card]) -> Card:
    """What the sources' cards say together; the scores were theirs, and are left out."""
    return Card(
        name,
        description=f"{recipe.method} of {recipe.mix}",
        skills=tuple(dict.fromkeys(skill for card in cards for skill in card.skills)),
        examples=tuple(dict.fromkeys(example for card in cards for example in card.examples)),
        base=next((card.base for card in cards if card.base), ""),
        base_fingerprint=next((c.base_fingerprint for c in cards if c.base_fingerprint), ""),
        licence=strictest(card.licence for card in cards),
    )


def write_recipe(folder: Path, recipe: Recipe, sources: Mapping[str, Adapter], **more: Any) -> None:
    """`merge.json`: enough to make the same files again, and to tell whether they are the same."""
    from importlib.metadata import version

    made = recipe.describe() | {
        "adapters": {name: sources[name].digest for name in recipe.mix},
        "loramix": version("loramix"),
    }
    text = json.dumps(made | more, indent=2, ensure_ascii=False)
    (folder / RECIPE).write_text(text + "\n", encoding="utf-8")


def _merged(
    layer: str, adapters: Mapping[str, Adapter], recipe: Recipe, size: Size
) -> tuple[Pair, float]:
    updates = recipe.updates(layer, adapters)
    with torch.inference_mode():
        found = recipe.merged(updates)
        if isinstance(found, Pair):
            return resized(found, size)
        if size.energy is not None:
            raise MergeError(
                f"{recipe.method} leaves an update of full rank, so no rank holds "
                f"{size.energy:g} of it cheaply; give --rank, or merge into the base with --into."
            )
        return approximated(updates.view(), found, size, size.rank or updates.rank)
