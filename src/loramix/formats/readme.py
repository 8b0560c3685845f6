"""README.md of a folder that is to be published: what it is, what it was made of, how to use it.

The front matter is what the hub reads (https://huggingface.co/docs/hub/model-cards). Everything is
taken from the files in the folder; nothing is asked of the network.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from loramix.adapter import Card
from loramix.errors import FormatError
from loramix.formats.card import read_card
from loramix.formats.config import interpret, load_config
from loramix.formats.folder import CARD, CONFIG, PLOT, RECIPE, TRAINING, find_weights
from loramix.formats.hub import is_hub_id
from loramix.mix import slug

README = "README.md"
LONG = ("kept", "tensors", "proof")  # of a recipe, by layer or told otherwise
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what its --max-lora-rank may be
Kind = Literal["adapter", "model", "gguf"]
RELATIONS: Mapping[Kind, str] = {"adapter": "adapter", "model": "finetune", "gguf": "quantized"}


@dataclass(frozen=True, slots=True)
class Published:
    """A folder as its README will show it."""

    kind: Kind
    card: Card
    recipe: Mapping[str, Any]  # of a merge; empty for anything else
    digests: Mapping[str, str]  # sha256 by file
    datasets: tuple[str, ...] = ()
    evaluations: tuple[Mapping[str, Any], ...] = ()  # as `loramix eval --json` prints them
    rank: int = 0  # the largest of an adapter; 0 if its config does not say
    is_rounded: bool = False  # a model whose layers have few bits each
    training: Mapping[str, Any] = field(default_factory=dict)  # of an expert that was learned here

    @property
    def relation(self) -> str:
        """The hub's word for how this comes from its base."""
        if self.is_rounded:
            return "quantized"
        merged = self.kind == "model" and self.recipe
        return "merge" if merged else RELATIONS[self.kind]

    def front_matter(self) -> dict[str, Any]:
        base = self.card.base if is_hub_id(self.card.base) else ""
        tags = ["loramix", "lora", *(["merge"] if self.recipe else [])]
        fields: dict[str, Any] = {
            "base_model": base,
            "base_model_relation": self.relation if base else "",
            "license": self.card.licence.lower(),
            "library_name": {"adapter": "peft", "model": "transformers", "gguf": "gguf"}[self.kind],
            "pipeline_tag": "text-generation",
            "tags": tags,
            "datasets": list(self.datasets),
        }
        return {key: value for key, value in fields.items() if value}


def describe(
    folder: str | Path,
    *,
    base: str = "",
    licence: str = "",
    datasets: Sequence[str] = (),
    scores: Sequence[Path] = (),
) -> Published:
    """What a folder holds; `base` and `licence` where its files do not say or say otherwise.

    `scores` are files that `loramix eval --json` printed.
    Raises FormatError if there is nothing to publish in it.
    """
    place = Path(folder)
    if not place.is_dir():
        raise FormatError(f"{folder} is no folder; give the folder to publish.")
    kind = _kind(place)
    card = _card(place, kind)
    known = replace(card, base=base or card.base, licence=licence or card.licence)
    recipe = load_config(place / RECIPE) if (place / RECIPE).is_file() else {}
    digests = {name: _sha256(place / name) for name in files(place) if name != README}
    if not isinstance(recipe.get("adapters", {}), dict):
        raise FormatError(f"{place / RECIPE}: adapters are no object; merge again.")
    rank = _rank(place) if kind == "adapter" else 0
    evaluations = tuple(_evaluation(file) for file in scores)
    rounded = kind == "model" and "quantization_config" in load_config(place / "config.json")
    return Published(
        kind,
        known,
        recipe,
        digests,
        tuple(datasets),
        evaluations,
        rank,
        rounded,
        load_config(place / TRAINING) if (place / TRAINING).is_file() else {},
    )


def files(folder: Path) -> list[str]:
    """What is published of a folder, sorted: all of it but hidden files."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(
        path.as_posix() for path in found if not any(part.startswith(".") for part in path.parts)
    )


def render(published: Published) -> str:
    """The README, front matter first."""
    matter = yaml.safe_dump(published.front_matter(), sort_keys=False, allow_unicode=True)
    sections = [
        f"---\n{matter}---",
        f"# {published.card.name}",
        published.card.description,
        "\n".join(_about(published)),
        _section("Examples", "\n".join(f"- {each}" for each in published.card.examples)),
        _section("Scores", "\n\n".join(_scores(published))),
        _section("Recipe", _recipe(published.recipe)),
        _section("Training", "\n\n".join(_training(published))),
        _section("Use", "\n\n".join(_uses(published))),
        _section("Provenance", _provenance(published)),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _kind(folder: Path) -> Kind:
    if (folder / CONFIG).is_file():
        find_weights(folder)
        return "adapter"
    if (folder / "config.json").is_file():
        return "model"
    if any(folder.glob("*.gguf")):
        return "gguf"
    raise FormatError(
        f"{folder} has no {CONFIG}, no config.json and no .gguf file; give the folder of an "
        f"adapter or a model."
    )


def _card(folder: Path, kind: Kind) -> Card:
    if (folder / CARD).is_file():
        return read_card(folder)
    name = slug(folder.resolve().name)
    if kind == "adapter":
        return Card(name, base=interpret(load_config(folder / CONFIG), str(folder)).base)
    return Card(name)


def _rank(folder: Path) -> int:
    settings = interpret(load_config(folder / CONFIG), str(folder / CONFIG))
    return max([settings.rank or 0, *settings.rank_pattern.values()])


def _about(published: Published) -> Iterator[str]:
    card = published.card
    what = {"adapter": "A LoRA adapter", "model": "A model", "gguf": "GGUF files"}[published.kind]
    yield f"{what}{f' for `{card.base}`' if card.base else ''}, made with loramix."
    if card.skills:
        yield f"It is for: {', '.join(card.skills)}."
    if card.weight != 1:
        yield f"Recommended weight: {card.weight:g}."


def _evaluation(file: Path) -> dict[str, Any]:
    """What `loramix eval --json` printed; FormatError for anything else."""
    found = load_config(file)
    try:
        shown = [_scored(row) for row in found["results"]]
    except (KeyError, TypeError, ValueError):
        shown = []
    if not shown or not {"data", "metric", "num_rows"} <= found.keys():
        raise FormatError(f"{file} is not what `loramix eval --json` prints; run it again.")
    return found


def _scores(published: Published) -> Iterator[str]:
    own = [(metric, f"{value:g}") for metric, value in published.card.scores.items()]
    if own:
        yield _table(("metric", "value"), own)
    for found in published.evaluations:
        yield f"{found['num_rows']} rows of {found['data']}, with 95 % intervals:"
        yield _table(("mix", found["metric"]), [_scored(row) for row in found["results"]])


def _scored(row: Mapping[str, Any]) -> tuple[str, str]:
    score = row["score"]
    mean, low, high = (float(score[part]) for part in ("mean", "low", "high"))
    return str(row["name"]), f"{mean:.3f} ({low:.3f} to {high:.3f})"


def _recipe(recipe: Mapping[str, Any]) -> str:
    if not recipe:
        return ""
    shown = {key: value for key, value in recipe.items() if key not in LONG}
    told = f"```json\n{json.dumps(shown, indent=2, ensure_ascii=False)}\n```"
    return "\n\n".join(filter(None, (told, _proof(recipe.get("proof", {})))))


def _proof(found: Mapping[str, float | None]) -> str:
    """What `loramix merge --prove` found, in a sentence."""
    if not found:
        return ""
    text = (
        f"Next tokens beside those of the served mix: KL(mix || merged) is {found['mean_kl']:.2g} "
        f"nats, at most {found['max_kl']:.2g}; KL(mix || base) is {found['base_kl']:.2g}."
    )
    if (alone := found.get("alone")) is not None:
        text += f" Each source alone comes out of this method within {alone:.1e} of itself."
    return text


def _training(published: Published) -> Iterator[str]:
    if PLOT in published.digests:
        yield f"![Loss of the rows learned and of those held out, by step]({PLOT})"
    if published.training:
        told = [(key.replace("_", " "), f"{value}") for key, value in published.training.items()]
        yield _table(("what", "was"), told)


def _uses(published: Published) -> Iterator[str]:
    if published.kind == "adapter":
        yield from _adapter_uses(published.card.name, published.card.base or "BASE", published.rank)
    elif published.kind == "model":
        yield from _model_uses(published.card.name)
    else:
        file = next(file for file in published.digests if file.endswith(".gguf"))
        yield _shell(f"llama-server -m {file}")


def _adapter_uses(name: str, base: str, rank: int) -> Iterator[str]:
    room = next((size for size in VLLM_RANKS if size >= rank), rank)
    yield "This folder, or the id of its repository, in place of `ADAPTER`:"
    yield _python(
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{base}")',
        'model = PeftModel.from_pretrained(model, "ADAPTER")',
        f'tokenizer = AutoTokenizer.from_pretrained("{base}")',
    )
    yield _shell(
        f"loramix adapters add ADAPTER --name {name}",
        f'loramix ask "..." --base {base} --mix {name}',
    )
    yield _shell(
        f"vllm serve {base} --enable-lora --max-lora-rank {room} --lora-modules {name}=ADAPTER"
    )
    yield _shell(
        f"loramix convert ADAPTER {name}.gguf --base {base}",
        f"llama-server -m BASE.gguf --lora {name}.gguf",
    )


def _model_uses(name: str) -> Iterator[str]:
    yield _python(
        "from transformers import AutoModelForCausalLM",
        "",
        'model = AutoModelForCausalLM.from_pretrained("MODEL")',
    )
    yield _shell('loramix ask "..." --base MODEL --mix base', "vllm serve MODEL")
    yield _shell(f"loramix convert MODEL {name}.gguf", f"llama-server -m {name}.gguf")


def _provenance(published: Published) -> str:
    card, rows = published.card, []
    if card.base_fingerprint:
        rows.append((f"fingerprint of the base {card.base}".strip(), card.base_fingerprint))
    for name, digest in published.recipe.get("adapters", {}).items():
        rows.append((f"source adapter {name}", str(digest)))
    rows += [(f"sha256 of {name}", digest) for name, digest in published.digests.items()]
    return _table(("what", "is"), [(what, f"`{value}`") for what, value in rows])


def _section(title: str, body: str) -> str:
    return f"## {title}\n\n{body}" if body else ""


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _python(*lines: str) -> str:
    return "```python\n" + "\n".join(lines) + "\n```"


def _shell(*lines: str) -> str:
    return "```sh\n" + "\n".join(lines) + "\n```"


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
