"""`loramix card`, `push` and `pull`: folders to the hub and back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loramix.cli.opening import hush, notice
from loramix.errors import BadRequest

Folder = Annotated[Path, typer.Argument(help="Of an adapter or a model.")]
Repository = Annotated[str, typer.Argument(metavar="REPO", help="owner/name on the hub.")]


def card(
    folder: Folder,
    base: Annotated[str, typer.Option(help="Hub id of the base, if its files say another.")] = "",
    licence: Annotated[str, typer.Option(help="Of the result, as the hub spells it.")] = "",
    dataset: Annotated[
        list[str] | None, typer.Option(help="Hub id it was trained on; repeatable.")
    ] = None,
    scores: Annotated[
        list[Path] | None, typer.Option(help="What loramix eval --json printed; repeatable.")
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace README.md.")] = False,
) -> None:
    """Write the README.md that the hub shows of a folder; nothing is asked of the network."""
    from loramix.formats.readme import README, describe, render

    place = folder / README
    if place.exists() and not replace:
        raise BadRequest(f"{place} exists; --replace writes it anew.")
    published = describe(
        folder, base=base, licence=licence, datasets=dataset or (), scores=scores or ()
    )
    text = render(published)
    new = place.with_name(f".{README}.new")
    new.write_text(text, encoding="utf-8")
    new.replace(place)
    if not published.card.licence:
        typer.echo("No licence is known; give one with --licence.", err=True)
    typer.echo(f"Wrote {place}.")


def push(
    folder: Folder,
    repo: Repository,
    private: Annotated[bool, typer.Option("--private", help="Make it private.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be sent.")] = False,
) -> None:
    """Send a folder to the hub in one commit; HF_TOKEN says who you are."""
    from loramix.formats.publish import plan
    from loramix.formats.publish import push as send

    hush()
    planned = plan(folder, repo)
    if dry_run:
        for name in planned.names:
            typer.echo(name)
        typer.echo(f"{len(planned.names)} files, {planned.size_bytes:,} bytes, to {repo}.")
        return
    with notice(f"Pushing {folder} ..."):
        address = send(planned, private=private)
    typer.echo(address)


def pull(
    repo: Repository,
    out: Annotated[
        Path | None, typer.Option("--output", "-o", help="Copy it to this new folder.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
) -> None:
    """Fetch a repository of the hub and print where it lies."""
    from loramix.formats.publish import pull as take

    hush()
    if out is not None and out.exists():
        raise BadRequest(f"{out} exists; give another folder.")
    with notice(f"Fetching {repo} ..."):
        place = take(repo, revision, out)
    typer.echo(str(place))
