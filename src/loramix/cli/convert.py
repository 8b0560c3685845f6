"""`loramix convert`: adapters, mixes and models from one format into another."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loramix.cli.flags import Where
from loramix.cli.opening import hush, notice
from loramix.errors import BadRequest
from loramix.formats.folder import CONFIG
from loramix.library import Library
from loramix.mix import Mix, slug

if TYPE_CHECKING:
    from loramix.adapter import Adapter

Source = Annotated[
    str,
    typer.Argument(
        help="An adapter (folder, file, .gguf, hub id), a mix of the library, or a model's folder."
    ),
]


def convert(
    source: Source,
    out: Annotated[Path, typer.Argument(help="A .gguf file, or a folder for PEFT.")],
    base: Annotated[str | None, typer.Option(help="Base of the adapter: folder or id.")] = None,
    library: Annotated[Path | None, typer.Option(help="Folder of adapters.")] = None,
    kind: Annotated[
        str | None, typer.Option("--type", help="In GGUF: f32, f16, bf16, q8_0, q4_0.")
    ] = None,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="Read .pt/.bin.")] = False,
) -> None:
    """Convert an adapter or a mix to GGUF or PEFT, or a model to GGUF."""
    hush()
    if out.exists():
        raise BadRequest(f"{out} exists; remove it first, or give another place.")
    if _is_model(source):
        _convert_model(source, out, kind)
    else:
        where = Where(base or "pocket", library)
        _convert_adapter(_adapter(source, where, base, allow_pickle), out, base, kind)
    typer.echo(f"Wrote {out}.")


def _is_model(source: str) -> bool:
    folder = Path(source)
    whole = (folder / "config.json").is_file() and not (folder / CONFIG).exists()
    return source == "pocket" or whole


def _convert_model(source: str, out: Path, kind: str | None) -> None:
    if out.suffix != ".gguf":
        raise BadRequest(f"{source} is a whole model, which becomes a .gguf file; not {out}.")
    from loramix.formats.checkpoint import open_checkpoint, open_tokenizer
    from loramix.formats.gguf.model import write_model

    checkpoint = open_checkpoint(source)
    with notice(f"Converting {source} ..."):
        tokenizer = open_tokenizer(checkpoint.folder)
        write_model(checkpoint, tokenizer, out, kind=kind or "f16", tell=_tell)


def _convert_adapter(adapter: Adapter, out: Path, base: str | None, kind: str | None) -> None:
    if out.suffix == ".gguf":
        from loramix.formats.checkpoint import open_config
        from loramix.formats.gguf.adapter import write_adapter

        source = base or adapter.card.base
        if not source:
            raise BadRequest(f"The card of {adapter.name!r} names no base; give --base.")
        write_adapter(adapter, open_config(source), out, kind=kind or "f32")
        return
    if kind:
        raise BadRequest(f"--type is for .gguf files; {out} becomes a PEFT folder.")
    _write_peft(adapter, out)


def _write_peft(adapter: Adapter, out: Path) -> None:
    from loramix.formats import peft
    from loramix.formats.aside import aside
    from loramix.formats.card import write_card

    with aside(out) as place:
        peft.write(adapter, place)
        write_card(adapter.card, place)


def _adapter(source: str, where: Where, base: str | None, allow_pickle: bool) -> Adapter:
    """What is to be converted: files, an adapter of the hub, or a mix of the library."""
    from loramix.formats import peft
    from loramix.formats.hub import fetch, is_hub_id

    if source.endswith(".gguf"):
        return _from_gguf(Path(source), base)
    if Path(source).exists():
        return peft.read(source, allow_pickle=allow_pickle, report=_tell)
    if is_hub_id(source):
        return peft.read(fetch(source), name=slug(source), report=_tell)
    return _mixed(Mix.parse(source), where.shelf)


def _from_gguf(file: Path, base: str | None) -> Adapter:
    if base is None:
        raise BadRequest(f"A GGUF adapter does not say its base's layers; give --base for {file}.")
    from loramix.formats.checkpoint import open_config
    from loramix.formats.gguf.adapter import read_adapter

    return read_adapter(file, open_config(base))


def _mixed(mix: Mix, shelf: Library) -> Adapter:
    """The adapters of a mix as one, stacked exactly; a single one as it is."""
    from loramix.formats.reshape import stacked

    terms = [(weight, shelf.load(name)) for name, weight in mix.items()]
    if len(terms) == 1 and terms[0][0] == 1:
        return terms[0][1]
    return stacked(slug(str(mix)), terms, f"The mix {mix}.")


def _tell(line: str) -> None:
    typer.echo(line, err=True)
