"""`loramix merge`: a mix as one adapter, or inside a copy of the base."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Option

from loramix.cli.flags import Where
from loramix.cli.opening import hush, notice
from loramix.errors import BadRequest
from loramix.lm import check_mix
from loramix.mix import Mix

if TYPE_CHECKING:
    from loramix.merge.fold import Merged

Set = Annotated[
    list[str] | None,
    Option(
        "--set",
        metavar="NAME[@PLACE]=NUMBER",
        help="A setting of the method, or an adapter's weight, in some layers; repeatable.",
    ),
]


def merge(
    where: Where,
    mix: Annotated[str, Option("--mix", "-m", metavar="MIX", help="What to merge.")],
    output: Annotated[Path, Option("--output", "-o", help="Folder to write.")],
    method: Annotated[str, Option(help="sum, average, slerp, ties, dare, tsv-m ...")] = "sum",
    settings: Set = None,
    seed: Annotated[int, Option(help="Of methods that drop at random.")] = 0,
    rank: Annotated[int | None, Option(help="Compress to this rank.")] = None,
    energy: Annotated[float | None, Option(help="Compress, keeping this share.")] = None,
    replace: Annotated[bool, Option("--replace", help="Replace what is there.")] = False,
) -> None:
    """Merge a mix into one adapter, exactly, from the adapters' own files."""
    hush()
    wanted = _mix(mix, where)
    if output.exists() and not replace:
        raise BadRequest(f"{output} exists; give another folder, or --replace.")
    from loramix.merge.core import Size
    from loramix.merge.fold import merge_adapters
    from loramix.merge.recipe import Recipe, settings_of

    recipe = Recipe(wanted, method, settings_of(settings or ()), seed)
    size = Size(rank, energy)
    with notice(f"Merging {wanted} ..."):
        adapters = {name: where.shelf.load(name) for name in wanted}
        merged = merge_adapters(adapters, recipe, size, name=output.name)
        merged.save(output, replace=replace)
    typer.echo(_told(merged, output))


def _mix(mix: str, where: Where) -> Mix:
    """The mix to merge, checked before torch is loaded."""
    if mix == "auto":
        raise BadRequest("A merge is of one mix; name adapters, as in sql:0.5+support:0.5.")
    check_mix(mix, where.shelf)
    return Mix.parse(mix)


def _told(merged: Merged, output: Path) -> str:
    pairs = merged.adapter.pairs
    ranks = sorted({pair.rank for pair in pairs.values()})
    shown = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    layer, kept = merged.least_kept
    lost = (
        f"It keeps {kept:.1%} of the update or more (least in {layer})." if kept < 0.99995 else ""
    )
    return (
        f"Merged {merged.recipe.mix} by {merged.recipe.method} into {output}: "
        f"{len(pairs)} layers of rank {shown}. {lost}"
    ).strip()
