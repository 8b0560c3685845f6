"""`loramix convert`: adapters, mixes and models from one format into another."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Option

from loramix.cli.flags import Where
from loramix.cli.opening import hush, notice
from loramix.cli.reading import read_answered
from loramix.errors import BadRequest
from loramix.formats.folder import CONFIG
from loramix.library import Library
from loramix.mix import Mix, slug

if TYPE_CHECKING:
    from loramix.adapter import Adapter
    from loramix.formats.factors import Approximated

FOUR_BITS = ("gptq", "awq")

Source = Annotated[
    str,
    typer.Argument(
        help="An adapter (folder, file, .gguf, hub id), a mix of the library, or a model's folder."
    ),
]


@dataclass(frozen=True, slots=True)
class Fitting:
    """How updates that are not of the rank asked for become so; what is lost is said."""

    rank: Annotated[int | None, Option(help="At most this rank; the error is said.")] = None
    exact: Annotated[bool, Option("--exact", help="Whole SVD, not a random one.")] = False
    lora_only: Annotated[bool, Option("--lora-only", help="Drop other changes.")] = False

    @property
    def is_asked_for(self) -> bool:
        return self != Fitting()

    def extracted(self, source: str, base: str | None, name: str) -> Adapter:
        """What a fine-tuned model changed in its base."""
        if base is None or self.rank is None:
            raise BadRequest(
                f"{source} is a whole model: give NAME.gguf, or --base and --rank to take what "
                f"fine-tuning changed as an adapter."
            )
        from loramix.formats.checkpoint import open_checkpoint
        from loramix.formats.factors import extract

        found = extract(
            open_checkpoint(source),
            open_checkpoint(base),
            self.rank,
            name,
            exact=self.exact,
            lora_only=self.lora_only,
        )
        _tell_error(found)
        card = replace(found.adapter.card, base=base)
        return replace(found.adapter, card=card)

    def resized(self, adapter: Adapter, base: str | None) -> Adapter:
        """An adapter of at most the rank asked for, DoRA made plain; as it is if none was."""
        if self.lora_only:
            raise BadRequest("--lora-only is for what a fine-tuned model changed.")
        if self.rank is None:
            if self.exact:
                raise BadRequest("--exact says how a --rank is reached; give one.")
            return adapter
        from loramix.formats.factors import compressed, without_dora

        if any(pair.magnitude is not None for pair in adapter.pairs.values()):
            from loramix.formats.checkpoint import open_checkpoint

            found = without_dora(
                adapter, open_checkpoint(_base(adapter, base)), self.rank, exact=self.exact
            )
        else:
            found = compressed(adapter, self.rank)
        _tell_error(found)
        return found.adapter


@dataclass(frozen=True, slots=True)
class Rounding:
    """How a model is rounded to four bits; what is lost is said."""

    data: Annotated[Path | None, Option(help="Rows for gptq and awq to look at.")] = None
    group_size: Annotated[
        int, Option(min=1, help="Inputs that share a scale, for gptq and awq.")
    ] = 128

    def check_unasked(self) -> None:
        if self != Rounding():
            raise BadRequest(f"--data and --group-size are for --type {' or '.join(FOUR_BITS)}.")

    def write(self, source: str, out: Path, kind: str) -> None:
        if self.data is None:
            raise BadRequest(f"{kind} looks at rows of what the model is for; give some by --data.")
        if not _is_model(source) or out.suffix in (".gguf", ".pt"):
            raise BadRequest(f"--type {kind} makes a folder of a model's folder.")
        from loramix.formats.fourbit import write_four_bits

        examples = read_answered(self.data)
        with notice(f"Rounding {source} ..."):
            lost = write_four_bits(source, examples, out, kind=kind, group_size=self.group_size)
        _tell(f"KL(model || rounded) is {lost:.3g} nats a token, on these rows.")


def convert(
    source: Source,
    out: Annotated[
        Path, typer.Argument(help="NAME.gguf, NAME.pt for minLoRA, or a folder for the others.")
    ],
    fitting: Fitting,
    rounding: Rounding,
    base: Annotated[str | None, Option(help="Base of the adapter: folder or id.")] = None,
    library: Annotated[Path | None, Option(help="Folder of adapters.")] = None,
    kind: Annotated[
        str | None,
        Option("--type", help="In GGUF: f32, f16, bf16, q8_0, q4_0. A model: gptq, awq."),
    ] = None,
    allow_pickle: Annotated[bool, Option("--allow-pickle", help="Read .pt/.bin.")] = False,
) -> None:
    """Convert an adapter or mix to GGUF, PEFT or minLoRA, a model to GGUF, GPTQ or an adapter."""
    hush()
    if out.exists():
        raise BadRequest(f"{out} exists; remove it first, or give another place.")
    if kind not in FOUR_BITS:
        rounding.check_unasked()
    if kind in FOUR_BITS or (_is_model(source) and out.suffix == ".gguf"):
        if base or library or allow_pickle or fitting.is_asked_for:
            raise BadRequest(
                "--base, --library, --allow-pickle, --rank, --exact and --lora-only are for "
                "adapters, not for a model in GGUF or four bits."
            )
        if kind in FOUR_BITS:
            rounding.write(source, out, kind)
        else:
            _convert_model(source, out, kind)
    else:
        if _is_model(source):
            adapter = fitting.extracted(source, base, slug(out.stem))
        else:
            where = Where(base or "pocket", library)
            adapter = fitting.resized(_adapter(source, where, base, allow_pickle), base)
        _write(adapter, out, base, kind)
    typer.echo(f"Wrote {out}.")


def _is_model(source: str) -> bool:
    folder = Path(source)
    whole = (folder / "config.json").is_file() and not (folder / CONFIG).exists()
    return source == "pocket" or whole


def _convert_model(source: str, out: Path, kind: str | None) -> None:
    from loramix.formats.checkpoint import open_checkpoint, open_tokenizer
    from loramix.formats.gguf.model import write_model

    checkpoint = open_checkpoint(source)
    with notice(f"Converting {source} ..."):
        tokenizer = open_tokenizer(checkpoint.folder)
        write_model(checkpoint, tokenizer, out, kind=kind or "f16", tell=_tell)


def _write(adapter: Adapter, out: Path, base: str | None, kind: str | None) -> None:
    if out.suffix == ".gguf":
        from loramix.formats.checkpoint import open_config
        from loramix.formats.gguf.adapter import write_adapter

        config = open_config(_base(adapter, base))
        write_adapter(adapter, config, out, kind=kind or "f32")
        return
    if kind:
        raise BadRequest(f"--type is for .gguf files, not for {out}.")
    if out.suffix == ".pt":
        from loramix.formats.minlora import write_minlora

        write_minlora(adapter, out)
    else:
        _write_peft(adapter, out)


def _base(adapter: Adapter, given: str | None) -> str:
    if not (source := given or adapter.card.base):
        raise BadRequest(f"The card of {adapter.name!r} names no base; give --base.")
    return source


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
    from loramix.merge.fold import merge_adapters
    from loramix.merge.recipe import Recipe

    adapters = {name: shelf.load(name) for name in mix}
    if list(mix.values()) == [1]:
        return next(iter(adapters.values()))
    return merge_adapters(adapters, Recipe(mix), name=slug(str(mix))).adapter


def _tell_error(found: Approximated) -> None:
    layer, worst = found.worst
    _tell(f"Off by {found.error:.3%} of the update, at most {worst:.3%} (in {layer}).")


def _tell(line: str) -> None:
    typer.echo(line, err=True)
