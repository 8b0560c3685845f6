"""`loramix keys`: who may ask the server. Without any key, everybody on this machine may."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from typer import Argument, Option

from loramix.cli.flags import Json
from loramix.cli.printing import print_json, print_table
from loramix.folders import own_database

if TYPE_CHECKING:
    from loramix.store import Store

keys = typer.Typer(help="Add, list and remove API keys.")
Name = Annotated[str, Argument(help="Whose key it is.")]
Database = Annotated[
    str | None, Option(help="Its URL; default: $LORAMIX_DATABASE, or a file of yours.")
]


@keys.command()
def add(
    name: Name,
    role: Annotated[Literal["user", "admin"], Option(help="Admins change what is served.")] = (
        "user"
    ),
    adapter: Annotated[
        list[str] | None, Option(help="It may use this adapter; repeatable. Default: all.")
    ] = None,
    requests_per_minute: Annotated[int | None, Option(help="More are refused.")] = None,
    tokens_per_minute: Annotated[int | None, Option(help="Of prompts and answers.")] = None,
    database: Database = None,
) -> None:
    """Make a key and print its secret, once: only its hash is kept."""
    with _store(database) as store:
        _, secret = store.keys.add(
            name,
            role=role,
            adapters=adapter or None,
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
        )
    typer.echo(secret)
    typer.echo("Keep it now: it cannot be shown again.", err=True)


@keys.command()
def secret() -> None:
    """Print a new secret for the keys of a settings file; nothing of it is kept."""
    from loramix.store.keys import new_secret

    typer.echo(new_secret())


@keys.command("list")
def list_(database: Database = None, as_json: Json = False) -> None:
    """List the keys, without their secrets."""
    with _store(database) as store:
        found = store.keys.list()
    if as_json:
        for key in found:
            print_json(asdict(key))
        return
    rows = [
        (
            key.name,
            key.role,
            "all" if key.adapters is None else ", ".join(key.adapters) or "none",
            _limit(key.requests_per_minute),
            _limit(key.tokens_per_minute),
        )
        for key in found
    ]
    print_table(("key", "role", "adapters", "requests/min", "tokens/min"), rows)


@keys.command()
def remove(name: Name, database: Database = None) -> None:
    """Remove a key; a running server refuses it from the next request on."""
    with _store(database) as store:
        store.keys.remove(name)
    typer.echo(f"Removed the key {name}.", err=True)


def _store(database: str | None) -> Store:
    from loramix.store import Store

    return Store.open(database or own_database())


def _limit(limit: int | None) -> str:
    return "-" if limit is None else str(limit)
