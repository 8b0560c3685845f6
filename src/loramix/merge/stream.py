"""A mix inside a copy of its base: streamed by blocks of rows, rounded once, never loaded.

    base files --read ahead--> rows in float32 + sum of updates --rounded--> written and hashed

Memory is a block for each core, whatever the size of the model. Files keep their names, headers and
offsets (or get new ones, with `shard_bytes`); tensors without an update are copied by the kernel.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from dataclasses import replace as replaced
from pathlib import Path

from torch import Tensor

from loramix.adapter import Adapter, Card
from loramix.errors import MergeError
from loramix.folders import POCKET_BASE
from loramix.formats.card import write_card
from loramix.formats.hub import fetch, is_hub_id
from loramix.formats.licences import stated_licence, strictest
from loramix.lora import Pair
from loramix.merge.files import Layout, copy_rest, kept_layout, new_layout, write_index
from loramix.merge.fold import check_alike, merged_card, write_recipe
from loramix.merge.journal import Staging, part_of, sha256_of, staging
from loramix.merge.output import Output, write_all
from loramix.merge.pipe import Written, run
from loramix.merge.places import Place, places
from loramix.merge.recipe import Recipe
from loramix.merge.registry import Outcome
from loramix.merge.rows import BLOCK, Rows, View
from loramix.merge.stored import ONE, Stored, StoredBase, open_stored
from loramix.mix import slug

MARGIN = 64 << 20  # bytes left free on the disk


@dataclass(frozen=True, slots=True)
class Into:
    """What a merge into a base did."""

    folder: Path
    num_folded: int  # tensors
    num_tensors: int
    num_resumed: int  # that an earlier run had written
    size_bytes: int
    worst: float  # largest error of a row read back, in units of the last place: 0.5 is the optimum


def merge_into(
    base: str | Path,
    adapters: Mapping[str, Adapter],
    recipe: Recipe,
    out: str | Path,
    *,
    shard_bytes: int | None = None,
    replace: bool = False,
) -> Into:
    """Write a copy of the base with the recipe's merged update in its weights.

    All updates are added in float32 and rounded once. A run that was killed is resumed by the same
    call. Raises BaseError, BaseMismatch, MergeError; `out` is then not there, or as it was.
    """
    opened, out = open_stored(base), Path(os.path.abspath(out))
    if opened.folder.resolve().is_relative_to(out.resolve()):
        raise MergeError(f"{out} holds the base itself; give another folder to write.")
    sources = {name: adapters[name] for name in recipe.mix}
    check_alike(sources.values())
    placed = places(sources.values(), opened)
    recipe.check_places(placed)
    layout = kept_layout(opened) if shard_bytes is None else new_layout(opened, shard_bytes)
    check_disk(out, layout.size_bytes)
    key = _key(opened, sources, recipe, shard_bytes)
    owners = _owners(placed.values())

    def fold(stored: Stored) -> Fold | None:
        mine = owners.get(stored.name)
        return Fold(stored, mine, sources, recipe) if mine else None

    with _told(out), staging(out, key, replace=replace) as aside:
        aside.sweep(keep=layout.headers)
        resumed = _resumable(aside, layout)
        hashes, worst = _write(aside, layout, fold, resumed)
        copy_rest(opened, aside.folder)
        if layout.headers.keys() != {ONE}:
            write_index(aside.folder, layout)
        write_card(_card(opened, sources, recipe), aside.folder)
        write_recipe(aside.folder, recipe, sources, tensors=hashes, base=str(opened.folder.name))
    return Into(out, len(owners), len(layout.slots), len(resumed), layout.size_bytes, worst)


@contextmanager
def _told(out: Path) -> Iterator[None]:
    """A full or failing disk as MergeError: what was written stays, to be resumed."""
    try:
        yield
    except OSError as error:
        raise MergeError(
            f"Cannot write {out}: {error.strerror or error}; the same merge goes on from there."
        ) from error


def base_folder(base: str, revision: str | None = None) -> Path:
    """Where the files of a base are: a folder, "pocket", or a hub id that is fetched if need be."""
    if base == "pocket":
        return POCKET_BASE
    if Path(base).is_dir() or not is_hub_id(base):
        return Path(base)
    return fetch(
        base,
        revision,
        files=("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "README.md"),
    )


class Fold:
    """The merged update of the layers of one stored tensor."""

    def __init__(
        self,
        stored: Stored,
        owners: Sequence[Place],
        adapters: Mapping[str, Adapter],
        recipe: Recipe,
    ) -> None:
        self.stored, self.owners = stored, owners
        self.adapters, self.recipe = adapters, recipe
        self._made: tuple[Place, Outcome, View | None] | None = None
        self._double: tuple[Tensor, Tensor] | None = None  # the A of `_made`, in float64

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Rows to fold at a time: as the methods look at them, and never of two layers."""
        step = max(1, BLOCK // self.stored.shape[1])
        end = 0
        for place in self.owners:
            if place.transposed:
                step = self.stored.shape[0]
            yield from _steps(end, place.start, step)
            yield from _steps(place.start, place.stop, step)
            end = place.stop
        yield from _steps(end, self.stored.shape[0], step)

    def add(self, start: int, rows: Tensor) -> None:
        """Add the merged update to rows [N, D] of the base in float32, in place."""
        place = self._place(start)
        if place is None:
            return
        outcome, view = self._outcome(place)
        _add(rows.T if place.transposed else rows, start - place.start, outcome, view)

    def exact(self, start: int, rows: Tensor) -> Tensor | None:
        """Rows of the base with the update, in float64; None where there are no factors."""
        place = self._place(start)
        if place is None:
            return rows.double()
        outcome, _ = self._outcome(place)
        if not isinstance(outcome, Pair) or outcome.magnitude is not None:
            return None
        at = slice(start - place.start, start - place.start + len(rows))
        if place.transposed:
            return rows.double() + outcome.a[:, at].T.double() @ outcome.b.T.double()
        if self._double is None or self._double[0] is not outcome.a:
            self._double = outcome.a, outcome.a.double()
        return rows.double() + outcome.b[at].double() @ self._double[1]

    def _place(self, start: int) -> Place | None:
        """Of the layer that owns a row."""
        return next((place for place in self.owners if place.start <= start < place.stop), None)

    def _outcome(self, place: Place) -> tuple[Outcome, View | None]:
        """The merged update of a layer, and its view if it comes by rows; kept until the next."""
        if self._made is None or self._made[0] is not place:
            updates = self.recipe.updates(
                place.layer, self.adapters, lambda i, j: _base(place, i, j)
            )
            outcome = self.recipe.merged(updates)
            view = None if isinstance(outcome, Pair) else updates.view()
            self._made = place, outcome, view
        return self._made[1], self._made[2]


def check_disk(out: Path, size_bytes: int) -> None:
    """MergeError if the copy does not fit beside what is there."""
    place = next(parent for parent in out.absolute().parents if parent.exists())
    part = part_of(out)
    there = sum(f.stat().st_blocks * 512 for f in part.iterdir()) if part.is_dir() else 0
    free = shutil.disk_usage(place).free + there
    if free < size_bytes + MARGIN:
        raise MergeError(
            f"{place} has {free / 1e9:.1f} GB free and the merged model needs "
            f"{(size_bytes + MARGIN) / 1e9:.1f} GB; make room, or give another folder."
        )


def _card(base: StoredBase, sources: Mapping[str, Adapter], recipe: Recipe) -> Card:
    """That of the merged adapter; the base's own licence counts as well."""
    cards = [adapter.card for adapter in sources.values()]
    card = merged_card(slug(str(recipe.mix)), recipe, cards)
    return replaced(card, licence=strictest([card.licence, stated_licence(base.folder)]))


def _write(
    aside: Staging,
    layout: Layout,
    fold: Callable[[Stored], Fold | None],
    resumed: Mapping[str, str],
) -> tuple[dict[str, str], float]:
    """Every tensor's bytes: their hashes by name, and the largest error of a row read back."""
    hashes, worst = dict(resumed), 0.0

    def done(written: Written) -> None:
        nonlocal worst
        hashes[written.name], worst = written.sha256, max(worst, written.worst)
        aside.record(written.name, written.sha256)

    with ExitStack() as files:
        opened: dict[str, Output] = {}
        for name, header in layout.headers.items():
            output = Output(aside.folder / name, layout.size_of(name))
            opened[name] = files.enter_context(output)
            write_all(output.file, memoryview(header), 0)
        todo = [slot for slot in layout.slots if slot.stored.name not in resumed]
        run(todo, opened, fold, done)
    return {slot.stored.name: hashes[slot.stored.name] for slot in layout.slots}, worst


def _add(rows: Tensor, start: int, outcome: Outcome, view: View | None) -> None:
    """Add rows `start` ... of the merged update to those of the base, in place."""
    stop = start + len(rows)
    if not isinstance(outcome, Pair):
        assert view is not None
        rows.add_(outcome(Rows(view.read(start, stop), start)))
    elif outcome.magnitude is None:
        rows.addmm_(outcome.b[start:stop], outcome.a)
    else:
        some = Pair(outcome.a, outcome.b[start:stop], outcome.magnitude[start:stop])
        rows.add_(some.delta(rows))


def _base(place: Place, start: int, stop: int) -> Tensor:
    """Rows of the pristine base as the layer sees them, float32."""
    if place.transposed:
        return place.stored.rows(0, place.stored.shape[0]).T[start:stop].float()
    return place.stored.rows(place.start + start, place.start + stop).float()


def _owners(placed: Iterable[Place]) -> dict[str, list[Place]]:
    """The layers that own rows of each stored tensor, in order."""
    found: dict[str, list[Place]] = {}
    for place in sorted(placed, key=lambda place: place.start):
        found.setdefault(place.stored.name, []).append(place)
    return found


def _resumable(aside: Staging, layout: Layout) -> dict[str, str]:
    """The tensors that an earlier run wrote, if their bytes are still what it hashed."""
    found = {}
    for slot in layout.slots:
        wanted = aside.done.get(slot.stored.name)
        file = aside.folder / slot.file
        if not wanted or not file.exists():
            continue
        with file.open("rb") as stream:
            if sha256_of(stream.fileno(), slot.offset, slot.stored.size_bytes) == wanted:
                found[slot.stored.name] = wanted
    return found


def _key(
    base: StoredBase, sources: Mapping[str, Adapter], recipe: Recipe, shard_bytes: int | None
) -> str:
    """What is being made of what: the same key, the same bytes."""
    files = [
        (shard.name, (base.folder / shard.name).stat().st_mtime_ns, shard.header.hex())
        for shard in base.shards
    ]
    digests = {name: adapter.digest for name, adapter in sources.items()}
    text = json.dumps([files, digests, recipe.describe(), shard_bytes], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _steps(start: int, stop: int, step: int) -> Iterator[tuple[int, int]]:
    for begin in range(start, stop, step):
        yield begin, min(begin + step, stop)
