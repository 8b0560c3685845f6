"""`loramix merge`: a mix as one adapter, or inside a copy of the base."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import replace as replaced
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Option

from loramix.cli.flags import Where
from loramix.cli.opening import hush, no_collection, notice
from loramix.cli.printing import print_table
from loramix.cli.reading import read_answered
from loramix.errors import BadRequest
from loramix.lm import check_mix
from loramix.merge.ahead import read_ahead
from loramix.mix import Mix, slug

if TYPE_CHECKING:
    from loramix.adapter import Adapter
    from loramix.merge.fold import Merged
    from loramix.merge.recipe import Recipe

REPLACED = {"adapter_config.json", "config.json"}  # one of them in what --replace may delete
Set = Annotated[
    list[str] | None,
    Option(
        "--set",
        metavar="NAME[@PLACE]=NUMBER",
        help="A setting of the method, or an adapter's weight, in some layers; repeatable.",
    ),
]


@dataclass(frozen=True, slots=True)
class How:
    """How updates become one."""

    method: Annotated[str, Option(help="sum, average, slerp, ties, dare, tsv-m ...")] = "sum"
    settings: Set = None
    seed: Annotated[int, Option(help="Of methods that drop at random.")] = 0
    data: Annotated[
        Path | None, Option(help="Rows with an adapter, a query and an answer each, for regmean.")
    ] = None

    def recipe(self, mix: Mix) -> Recipe:
        """Checked before anything is read; without the rows."""
        from loramix.merge.recipe import Recipe, settings_of

        recipe = Recipe(mix, self.method, settings_of(self.settings or ()), self.seed)
        if self.data is not None and not recipe.how.reads_inputs:
            raise BadRequest(f"--data does not go with this: {self.method} weighs by no rows.")
        return recipe

    def informed(self, recipe: Recipe, adapters: Mapping[str, Adapter], base: str) -> Recipe:
        """With what layers of the base are given, if there are rows to run through it."""
        if self.data is None:
            return recipe
        from loramix.base import open_base
        from loramix.merge.moments import gathered

        examples = read_answered(self.data)
        return replaced(recipe, moments=gathered(open_base(base), adapters, examples))


def merge(
    where: Where,
    how: How,
    mix: Annotated[str, Option("--mix", "-m", metavar="MIX", help="What to merge.")],
    output: Annotated[Path | None, Option("--output", "-o", help="Folder to write.")] = None,
    rank: Annotated[int | None, Option(help="Compress to this rank.")] = None,
    energy: Annotated[float | None, Option(help="Compress, keeping this share.")] = None,
    into: Annotated[str | None, Option(help="Write this base with the mix in its weights.")] = None,
    shard_size: Annotated[str | None, Option(help="Files of at most this, such as 5GB.")] = None,
    lint: Annotated[bool, Option("--lint", help="Only look: fit, interference, losses.")] = False,
    prove: Annotated[bool, Option("--prove", help="Compare logits with the served mix.")] = False,
    verify: Annotated[bool, Option("--verify", help="Read the model back, check hashes.")] = False,
    replace: Annotated[bool, Option("--replace", help="Replace what is there.")] = False,
) -> None:
    """Merge a mix into one adapter, or with --into into a copy of the base; exactly."""
    hush()
    wanted = _mix(mix, where)
    to_adapter: dict[str, object] = {"--rank": rank, "--energy": energy}
    to_base: dict[str, object] = {"--shard-size": shard_size, "--verify": verify}
    if lint:
        writing = {"--output": output, "--replace": replace, "--data": how.data, "--prove": prove}
        _refuse(to_adapter | to_base | writing, "--lint only looks and merges nothing")
        _look(where, wanted, how, into)
        return
    if output is None:
        raise BadRequest("Give the folder to write with --output, or --lint to only look.")
    _check_output(output, replace=replace)
    if prove:
        _check_base(into or where.base)
    if into is None:
        _refuse(to_base, "it is for a merge --into a base")
        _into_adapter(where, wanted, how, output, (rank, energy), replace=replace)
    else:
        _refuse(to_adapter, "a base takes the whole update")
        shard_bytes = None if shard_size is None else _bytes(shard_size)
        _into_base(where, wanted, how, output, into, shard_bytes, replace=replace)
    if verify:
        _verify(output)
    if prove:
        _prove(where, how.recipe(wanted), into or where.base, output)


def _into_adapter(
    where: Where,
    mix: Mix,
    how: How,
    output: Path,
    size: tuple[int | None, float | None],
    *,
    replace: bool,
) -> None:
    with notice(f"Merging {mix} ..."), no_collection():
        from loramix.merge.core import Size
        from loramix.merge.fold import merge_adapters

        recipe, limit = how.recipe(mix), Size(*size)
        adapters = {name: where.shelf.load(name) for name in mix}
        recipe = how.informed(recipe, adapters, where.base)
        merged = merge_adapters(adapters, recipe, limit, name=slug(output.resolve().name))
        merged.save(output, replace=replace)
    typer.echo(_told(merged, output))


def _into_base(
    where: Where,
    mix: Mix,
    how: How,
    output: Path,
    base: str,
    shard_bytes: int | None,
    *,
    replace: bool,
) -> None:
    with notice(f"Merging {mix} ..."), no_collection():
        read_ahead(Path(base))
        from loramix.merge.lint import trained_elsewhere
        from loramix.merge.stream import base_folder, merge_into

        recipe, folder = how.recipe(mix), base_folder(base)
        adapters = {name: where.shelf.load(name) for name in mix}
        for name in trained_elsewhere(adapters.values(), folder):
            typer.echo(
                f"{name} was trained on weights other than those of {base}, or its files use older "
                f"names; --lint and --prove tell more.",
                err=True,
            )
        recipe = how.informed(recipe, adapters, str(folder))
        did = merge_into(folder, adapters, recipe, output, shard_bytes=shard_bytes, replace=replace)
    resumed = f", {did.num_resumed} of them by an earlier run" if did.num_resumed else ""
    typer.echo(
        f"Merged {mix} by {how.method} into {output}: {did.num_folded} of {did.num_tensors} "
        f"tensors of {base} changed{resumed}. Rows read back are within {did.worst:.2f} of the "
        f"last place."
    )


def _verify(output: Path) -> None:
    from loramix.merge.verify import verify

    count = verify(output)
    typer.echo(
        f"Read back from the disk: all {count} tensors have the hash they were written with."
    )


def _prove(where: Where, recipe: Recipe, base: str, output: Path) -> None:
    from loramix.merge.proof import prove
    from loramix.merge.stream import base_folder

    adapters = {name: where.shelf.load(name) for name in recipe.mix}
    proof = prove(base_folder(base), output, adapters, recipe)
    typer.echo(
        f"KL(mix || merged) is {proof.mean_kl:.3g} nats a token, at most {proof.max_kl:.3g}; "
        f"KL(mix || base) is {proof.base_kl:.3g}."
    )


def _refuse(flags: Mapping[str, object], reason: str) -> None:
    """BadRequest for a flag that was given and would be ignored."""
    for flag, value in flags.items():
        if value is not None and value is not False:
            raise BadRequest(f"{flag} does not go with this: {reason}; leave it out.")


def _check_output(output: Path, *, replace: bool) -> None:
    if output.exists() and not replace:
        raise BadRequest(f"{output} exists; give another folder, or --replace.")
    if Path.cwd().is_relative_to(output.resolve()):
        raise BadRequest(f"{output} is where you are, and would be deleted; give another folder.")
    if output.exists() and not _may_go(output):
        raise BadRequest(f"{output} holds no adapter or model to replace; give another folder.")


def _may_go(output: Path) -> bool:
    """Whether it is a folder with nothing in it, or with an adapter or a model."""
    held = {child.name for child in output.iterdir()} if output.is_dir() else {output.name}
    return not held or not held.isdisjoint(REPLACED)


def _check_base(base: str) -> None:
    """What --prove will open, looked at before anything is written."""
    from loramix.formats.checkpoint import open_checkpoint, open_tokenizer
    from loramix.merge.stream import base_folder

    open_tokenizer(open_checkpoint(str(base_folder(base))).folder)


def _mix(mix: str, where: Where) -> Mix:
    """The mix to merge, checked before torch is loaded."""
    if mix == "auto":
        raise BadRequest("A merge is of one mix; name adapters, as in sql:0.5+support:0.5.")
    check_mix(mix, where.shelf)
    return Mix.parse(mix)


def _look(where: Where, mix: Mix, how: How, into: str | None) -> None:
    """Print the report of --lint."""
    from loramix.merge.lint import lint as look
    from loramix.merge.stream import base_folder

    adapters = {name: where.shelf.load(name) for name in mix}
    found = look(adapters, how.recipe(mix), None if into is None else base_folder(into))
    for name, count in found.num_updates.items():
        if into:
            mark = found.fingerprints[name]
            typer.echo(f"{name}: {count} of {count} updates find one tensor in {into}; base {mark}")
        else:
            typer.echo(f"{name}: {count} updates, no base given")
    titles = ("pair", "layers", "cosine", "writes overlap", "reads overlap", "opposite signs")
    rows = [
        (
            " ".join(met.names),
            str(met.num_layers),
            *(f"{x:.3f}" for x in (met.cosine, met.writes_overlap, met.reads_overlap)),
            f"{met.conflict:.1%}",
        )
        for met in found.meetings
    ]
    if rows:
        print_table(titles, rows)
    energy = "  ".join(f"{rank}: {share:.1%}" for rank, share in found.kept.items())
    if energy:
        typer.echo(f"Energy of the sum by rank   {energy}")
    if found.lost is not None:
        typer.echo(f"Lost by rounding to {found.dtype}   {found.lost:.1%} of the update")
    for sentence in found.advice:
        typer.echo(f"- {sentence}")


def _bytes(text: str) -> int:
    """A size such as 5GB, 500MB or a number of bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]?)B?", text.strip().upper())
    if not found:
        raise BadRequest(f"Cannot read the size {text!r}; expected something like 5GB or 500MB.")
    return int(float(found[1]) * 1000 ** " KMGT".index(found[2] or " "))


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
