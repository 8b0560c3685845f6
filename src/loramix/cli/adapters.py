"""`loramix adapters`: the folder that mixes are made from.

Without `--library` the commands see your own library and pocket's; what they change is your own.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from loramix.adapter import Card
from loramix.cli.flags import Json, Machine, flags
from loramix.cli.opening import hush, notice
from loramix.cli.printing import print_json, print_table
from loramix.errors import BadRequest, RouteError, UnknownAdapter
from loramix.folders import POCKET_LIBRARY, own_library
from loramix.library import Library
from loramix.lm import ROUTER, has_router
from loramix.mix import check_name

if TYPE_CHECKING:
    from loramix.adapter import Adapter
    from loramix.library import Check
    from loramix.route.encode import Encoder
    from loramix.route.gate import GateRouter

Folder = Annotated[Path | None, typer.Option("--library", help="Folder of adapters.")]
Name = Annotated[str, typer.Argument(help="Name of an adapter in the library.")]

adapters = typer.Typer(help="Add, list, show, remove and check adapters.")


@adapters.command("list")
def list_(library: Folder = None, as_json: Json = False) -> None:
    """List the adapters by name, with what they are for."""
    shelves = _shelves(library)
    for shelf in shelves:
        for problem in shelf.damaged().values():
            typer.echo(f"Damaged: {problem}", err=True)
    if as_json:
        for shelf in shelves:
            for card in shelf.cards():
                print_json(asdict(card))
        return
    rows = [
        (card.name, card.base, _scores(card), card.description, _place(shelf))
        for shelf in shelves
        for card in shelf.cards()
    ]
    print_table(("adapter", "base", "scores", "description", "library"), rows)


@adapters.command()
def show(name: Name, library: Folder = None, as_json: Json = False) -> None:
    """Show an adapter's card."""
    shelf = _holder(name, library)
    card = shelf.card(name)
    if as_json:
        print_json(asdict(card))
        return
    for key, value in asdict(card).items():
        if value:
            typer.echo(f"{key:17} {_words(value)}")
    typer.echo(f"{'folder':17} {shelf.path(name)}")


@adapters.command()
def add(
    source: Annotated[str, typer.Argument(help="Folder, file or hub id of a LoRA adapter.")],
    library: Folder = None,
    name: Annotated[str | None, typer.Option(help="Name it; default: from the source.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="Read .pt/.bin.")] = False,
    lora_only: Annotated[bool, typer.Option("--lora-only", help="Drop other tensors.")] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Replace one of this name.")] = False,
    examples: Annotated[Path | None, typer.Option(help="Queries to route to it, by line.")] = None,
) -> None:
    """Add an adapter to a library, whose router knows it at once: by --examples, or by its card."""
    hush()
    if name is not None:
        check_name(name)
    queries = []
    if examples:
        from loramix.route.rows import read_queries

        queries = read_queries(examples)
    shelf = Library(library or own_library())
    with TemporaryDirectory() as staging, notice(f"Reading {source} ..."):
        staged = Library(staging)
        card = staged.add(
            source,
            name=name,
            revision=revision,
            allow_pickle=allow_pickle,
            lora_only=lora_only,
            report=lambda line: typer.echo(line, err=True),
        )
        grown = _put(shelf, staged.load(card.name), queries, replace=replace)
    typer.echo(f"Added {card.name} to {shelf.folder}.", err=True)
    if grown:
        typer.echo(f"Its router chooses among {', '.join(grown.adapters)}.", err=True)
    if grown and grown.fresh:
        from loramix.route.refit import refit_in

        with notice("Learning all of them together; ending this keeps the router as it is ..."):
            refit_in(shelf.folder / ROUTER)


@adapters.command()
def remove(name: Name, library: Folder = None) -> None:
    """Remove an adapter from a library, and from its router."""
    shelf = Library(library or own_library())
    shelf.path(name)
    _forget(shelf, name)
    shelf.remove(name)
    typer.echo(f"Removed {name} from {shelf.folder}.", err=True)


@adapters.command()
@flags
def check(
    name: Name,
    machine: Machine,
    base: Annotated[str | None, typer.Option(help="Base to try; default: its card's.")] = None,
    library: Folder = None,
    as_json: Json = False,
) -> None:
    """Prove on a probe batch that an adapter changes what the base says, and by how much."""
    shelf = _holder(name, library)
    adapter = shelf.load(name)
    source = base or adapter.card.base
    if not source:
        raise BadRequest(f"The card of {name!r} names no base; give --base.")
    from loramix.base import open_base
    from loramix.library import check as prove

    hush()
    with notice(f"Opening {source} ..."):
        opened = open_base(
            source,
            dtype=machine.dtype,
            device=machine.device,
            revision=machine.revision,
            quantize=machine.quantize,
        )
    result = prove(adapter, opened)
    if as_json:
        print_json({"name": name, "base": opened.id, **asdict(result)})
    else:
        typer.echo(_proof(name, opened.id, result))


def open_encoder(name: str) -> Encoder:
    from loramix.route.encode import MiniLmEncoder, default_encoder
    from loramix.route.ngrams import NgramEncoder

    makers: dict[str, Callable[[], Encoder]] = {
        "auto": default_encoder,
        "ngrams": partial(NgramEncoder, seams=True),
        "minilm": MiniLmEncoder.open,
    }
    if name not in makers:
        raise RouteError(f"Unknown encoder {name!r}; expected {', '.join(makers)}.")
    return makers[name]()


def _put(
    shelf: Library, adapter: Adapter, queries: list[str], *, replace: bool
) -> GateRouter | None:
    """Add an adapter to a library and to its router; the router, if that changed."""
    from loramix.route.change import changing

    with changing(shelf.folder / ROUTER):
        grown = _grown_router(shelf, adapter.card, queries)
        shelf.put(adapter, replace=replace)
        if grown:
            grown.save(shelf.folder / ROUTER)
    return grown


def _grown_router(shelf: Library, card: Card, queries: list[str]) -> GateRouter | None:
    """The library's router once it knows an adapter, by its card if there are no queries.

    None if there is nothing to change: no router and no queries, or one that has queries of it.
    """
    from loramix.route.gate import GateRouter

    if not has_router(shelf):
        return GateRouter.fit({card.name: queries}) if queries else None
    return GateRouter.load(shelf.folder / ROUTER).meet(card, queries)


def _forget(shelf: Library, name: str) -> None:
    """Take an adapter out of the library's router, if it has one that knows it."""
    from loramix.route.change import changing
    from loramix.route.gate import GateRouter

    if not has_router(shelf):
        return
    with changing(shelf.folder / ROUTER):
        known = GateRouter.load(shelf.folder / ROUTER)
        if known.adapters == (name,):
            shutil.rmtree(shelf.folder / ROUTER)
        elif name in known.adapters:
            known.remove(name).save(shelf.folder / ROUTER)


def _shelves(library: Path | None) -> list[Library]:
    return [Library(f) for f in ([library] if library else [own_library(), POCKET_LIBRARY])]


def _holder(name: str, library: Path | None) -> Library:
    """The library that holds an adapter; your own before pocket's."""
    shelves = _shelves(library)
    for shelf in shelves:
        if name in shelf.names():
            return shelf
    raise UnknownAdapter(name, [known for shelf in shelves for known in shelf.names()])


def _proof(name: str, base: str, found: Check) -> str:
    layer, norm = max(found.norms.items(), key=lambda item: item[1])
    return (
        f"{name} changes {len(found.norms)} layers of {base}.\n"
        f"|dW| / |W|            {found.norm:.4g}, largest {norm:.4g} in {layer}\n"
        f"KL(base || adapted)   {found.mean_kl:.4g} nats a token, largest {found.max_kl:.4g}"
    )


def _place(shelf: Library) -> str:
    return "pocket" if shelf.folder == POCKET_LIBRARY else str(shelf.folder)


def _scores(card: Card) -> str:
    return " ".join(f"{metric} {value:g}" for metric, value in card.scores.items())


def _words(value: object) -> str:
    if isinstance(value, dict):
        return "  ".join(f"{key} {each:g}" for key, each in value.items())
    if isinstance(value, list | tuple):
        return "\n".join(f"{'' if n == 0 else ' ' * 18}{each}" for n, each in enumerate(value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
