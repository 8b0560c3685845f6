"""Merging from Python: one call, or step by step.

>>> import loramix
>>> merged = loramix.merge("sql:0.5+support:0.5", method="slerp")  # doctest: +SKIP
>>> merged.save("both")  # doctest: +SKIP

>>> merger = loramix.Merger("base-folder", ["one", "two"])  # doctest: +SKIP
>>> merger.merge(method="weighted", weights=[0.6, 0.4]).save_pretrained("out")  # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from loramix.adapter import Adapter
from loramix.errors import HubError, MergeError
from loramix.folders import POCKET_LIBRARY
from loramix.formats import peft
from loramix.formats.hub import fetch, is_hub_id
from loramix.formats.publish import plan, push
from loramix.library import Library
from loramix.merge.core import Size
from loramix.merge.fold import Merged, merge_adapters
from loramix.merge.moments import Moments
from loramix.merge.recipe import Recipe, settings_of
from loramix.merge.stream import Into, base_folder, merge_into
from loramix.mix import Mix, slug

Settings = Mapping[str, float] | Iterable[str]


def merge(
    mix: str | Mix,
    library: str | Path | Library = POCKET_LIBRARY,
    *,
    method: str = "sum",
    settings: Settings = (),
    rank: int | None = None,
    energy: float | None = None,
    seed: int = 0,
    moments: Moments | None = None,
) -> Merged:
    """A mix of a library's adapters as one adapter, which `save` writes.

    `settings` are as in {"density": 0.3, "density@mlp": 0.5}; `moments` (`merge.moments.gathered`)
    are for regmean. Raises MixError, AdapterError, MergeError.
    """
    shelf = library if isinstance(library, Library) else Library(library)
    mix = Mix.parse(mix) if isinstance(mix, str) else mix
    recipe = Recipe(mix, method, settings_of(settings), seed, moments)
    adapters = {name: shelf.load(name) for name in recipe.mix}
    return merge_adapters(adapters, recipe, Size(rank, energy), name=f"{method}-of-{len(adapters)}")


class Merger:
    """A base and adapters by folder or hub id; without a base, merges are adapters.

    Adapters are called by the last part of their id; of two that are called alike, the second
    is numbered.
    """

    def __init__(self, base: str | Path | None, adapters: Sequence[str | Path]) -> None:
        if not adapters:
            raise MergeError("There is nothing to merge; give folders or hub ids of adapters.")
        self.base = base
        self.adapters: dict[str, Adapter] = {}
        for source in adapters:
            place = Path(source)
            if not place.exists() and is_hub_id(str(source)):
                place = fetch(str(source))
            name = self._name(slug(Path(source).name))
            self.adapters[name] = peft.read(place, name=name)

    def merge(
        self,
        method: str = "average",
        *,
        weights: Sequence[float] | Mapping[str, float] | None = None,
        settings: Settings = (),
        seed: int = 0,
        moments: Moments | None = None,
    ) -> Merging:
        """How to merge; nothing is computed before it is saved.

        `weights` are one for each adapter, in order or by name; 1 unless given. "weighted" is the
        sum with these weights as they are, "average" divides by their sum.
        """
        if weights is None:
            weights = [1.0] * len(self.adapters)
        if not isinstance(weights, Mapping):
            if len(weights) != len(self.adapters):
                raise MergeError(
                    f"Got {len(weights)} weights for {len(self.adapters)} adapters; give as many."
                )
            weights = dict(zip(self.adapters, weights, strict=True))
        if strays := weights.keys() - self.adapters.keys():
            raise MergeError(
                f"There is a weight for {', '.join(sorted(strays))}; expected a name of "
                f"{', '.join(self.adapters)}."
            )
        if missing := self.adapters.keys() - weights.keys():
            raise MergeError(
                f"There is no weight for {', '.join(sorted(missing))}; give 0 to leave it out."
            )
        return Merging(self, Recipe(Mix(weights), method, settings_of(settings), seed, moments))

    def _name(self, name: str) -> str:
        count = 2
        while (numbered := name if count == 2 else f"{name}-{count - 1}") in self.adapters:
            count += 1
        return numbered


@dataclass(frozen=True, slots=True)
class Merging:
    """A merge that is decided and not yet made."""

    merger: Merger
    recipe: Recipe

    def adapter(self, *, rank: int | None = None, energy: float | None = None) -> Merged:
        """As one adapter, whatever the base."""
        return merge_adapters(self.merger.adapters, self.recipe, Size(rank, energy))

    def save_pretrained(
        self, folder: str | Path, *, shard_bytes: int | None = None, replace: bool = False
    ) -> Merged | Into:
        """Write the merged model, or without a base the merged adapter, whole or not at all."""
        if self.merger.base is not None:
            return merge_into(
                base_folder(str(self.merger.base)),
                self.merger.adapters,
                self.recipe,
                folder,
                shard_bytes=shard_bytes,
                replace=replace,
            )
        if shard_bytes is not None:
            raise MergeError("An adapter is one file; shard_bytes is for a merge into a base.")
        merged = self.adapter()
        merged.save(folder, replace=replace)
        return merged

    def push_to_hub(
        self, repository: str, *, private: bool = False, shard_bytes: int | None = None
    ) -> str:
        """Write what `save_pretrained` would where temporary files go, push it in one commit with a
        card, and return the commit's address. Raises HubError, MergeError.
        """
        if not is_hub_id(repository):
            raise HubError(f"{repository!r} is no hub id; expected owner/name.")
        with TemporaryDirectory() as scratch:
            folder = Path(scratch) / slug(repository.rpartition("/")[2])
            self.save_pretrained(folder, shard_bytes=shard_bytes)
            return push(plan(folder, repository), private=private)
