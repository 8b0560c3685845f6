"""The folder of adapters: one clean PEFT folder with a card for each, under its name.

    library/
      support/   adapter_config.json  adapter_model.safetensors  card.json
      sql/       ...
      _router/   the router fitted on them; a name never begins with "_"

Whatever layout an adapter came in, what lies here reads the same and is known to be readable:
`add` writes a copy only after the whole of it was understood.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, cast
from uuid import uuid4

from loramix.adapter import Adapter, Card
from loramix.errors import AdapterError, BaseMismatch, LoramixError, UnknownAdapter
from loramix.formats.aside import aside
from loramix.formats.card import read_card, write_card
from loramix.formats.config import interpret, load_config
from loramix.formats.folder import CARD, CONFIG, find_weights
from loramix.formats.hub import fetch, is_hub_id
from loramix.mix import check_name, slug

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from loramix.base import Base
    from loramix.lora import Pair
    from loramix.mixed import MixedModel

PROBE_ROWS, PROBE_TOKENS = 4, 16


class Library:
    """Adapters by name in one folder; a folder that does not exist yet is an empty library."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise AdapterError(f"{folder} is a file; a library is a folder of adapters.")
        self._prompts: dict[str, tuple[tuple[int, int], str]] = {}  # after the state of its file

    def names(self) -> list[str]:
        """The adapters that are there, damaged ones included."""
        if not self.folder.exists():
            return []
        inside = (child.name for child in self.folder.iterdir() if child.is_dir())
        return sorted(name for name in inside if not name.startswith(("_", ".")))

    def __contains__(self, name: str) -> bool:
        """Whether an adapter is there, found without looking at the others."""
        is_plain = name == Path(name).name != "" and not name.startswith(("_", "."))
        return is_plain and (self.folder / name).is_dir()

    def cards(self) -> list[Card]:
        """The cards of all adapters that are whole; `damaged` tells of the rest."""
        return [card for card in map(self._card, self.names()) if isinstance(card, Card)]

    def damaged(self) -> dict[str, str]:
        """What is wrong with the folders that are not an adapter's any more, by name."""
        cards = {name: self._card(name) for name in self.names()}
        return {name: card for name, card in cards.items() if isinstance(card, str)}

    def card(self, name: str) -> Card:
        """Raises UnknownAdapter, or FormatError naming the folder if it is damaged."""
        folder = self.path(name)
        check_name(name)
        find_weights(folder)
        config = interpret(load_config(folder / CONFIG), str(folder / CONFIG))
        if not (folder / CARD).exists():  # a PEFT folder somebody copied in
            return Card(name, base=config.base)
        return dataclasses.replace(read_card(folder), name=name)

    def path(self, name: str) -> Path:
        """The folder of an adapter; UnknownAdapter if the library has none of this name."""
        if name not in self:
            raise UnknownAdapter(name, self.names())
        return self.folder / name

    def system_prompt(self, name: str) -> str:
        """That of an adapter's card, or ""; read again only when the file has changed.

        Raises FormatError for a damaged one.
        """
        try:
            found = (self.folder / name / CARD).stat()
        except OSError:  # it has no card, or is in memory only
            return ""
        state = found.st_mtime_ns, found.st_size
        if name not in self._prompts or self._prompts[name][0] != state:
            self._prompts[name] = state, read_card(self.folder / name).system_prompt
        return self._prompts[name][1]

    def load(self, name: str) -> Adapter:
        """Raises UnknownAdapter, or FormatError naming the folder if it is damaged."""
        from loramix.formats import peft

        return peft.read(self.path(name), name=name)

    def add(
        self,
        source: str | Path,
        *,
        name: str | None = None,
        revision: str | None = None,
        allow_pickle: bool = False,
        lora_only: bool = False,
        replace: bool = False,
        report: Callable[[str], None] | None = None,
    ) -> Card:
        """Copy an adapter in from a folder, a file or the hub, and return its card.

        The options are those of `formats.peft.read`; `revision` is for the hub alone. Raises
        AdapterError, and FormatError for what is not a LoRA; the library is then as it was.
        """
        adapter = self.read(
            source,
            name=name,
            revision=revision,
            allow_pickle=allow_pickle,
            lora_only=lora_only,
            report=report,
        )
        self.put(adapter, replace=replace)
        return adapter.card

    def read(
        self,
        source: str | Path,
        *,
        name: str | None = None,
        revision: str | None = None,
        allow_pickle: bool = False,
        lora_only: bool = False,
        report: Callable[[str], None] | None = None,
    ) -> Adapter:
        """What `add` would put here."""
        from loramix.formats import peft

        place, own_name = self._locate(source, revision)
        return peft.read(
            place,
            name=name or own_name,
            allow_pickle=allow_pickle,
            lora_only=lora_only,
            report=report,
        )

    def put(
        self,
        adapter: Adapter,
        *,
        replace: bool = False,
        beside: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Write an adapter that is already in memory, with its card, whole or not at all.

        `beside` are texts by file name that lie in its folder too.
        """
        from loramix.formats import peft

        check_name(adapter.name)
        _refuse_base_name(adapter.name, adapter.card.base)
        if adapter.name in self and not replace:
            raise AdapterError(
                f"The library has an adapter {adapter.name!r} already; give another name, remove "
                f"it, or ask for it to be replaced."
            )
        with aside(self.folder / adapter.name, replace=replace) as place:
            peft.write(adapter, place)
            write_card(adapter.card, place)
            for name, text in beside.items():
                (place / name).write_text(text, encoding="utf-8")

    def remove(self, name: str) -> None:
        """Delete an adapter; UnknownAdapter if there is none of this name."""
        doomed = self.folder / f".{name}.old-{uuid4().hex[:8]}"
        self.path(name).rename(doomed)
        shutil.rmtree(doomed)

    def locate(self, source: str) -> Path:
        """Where the files of an adapter are: one of the library, a folder, a file or a hub id."""
        return self.path(source) if source in self else self._locate(source, None)[0]

    def _locate(self, source: str | Path, revision: str | None) -> tuple[Path, str | None]:
        """Where the files are, and the name a hub id gives them."""
        if Path(source).exists():
            if revision:
                raise AdapterError(f"{source} is a local path; a revision is for hub ids only.")
            return Path(source), None
        if is_hub_id(str(source)):
            return fetch(str(source), revision), slug(str(source))
        raise AdapterError(f"{source} does not exist; expected a folder, a file or a hub id.")

    def _card(self, name: str) -> Card | str:
        """The card, or what is wrong: the one place that goes on after an error."""
        try:
            return self.card(name)
        except LoramixError as error:
            return str(error)


@dataclass(frozen=True, slots=True)
class Check:
    """How much an adapter changes its base: its matrices, and the next token it expects.

    Norms are |dW| / |W| (Frobenius), by layer and over all adapted layers. The divergences are
    KL(base || adapted) in nats over the positions of a probe of random tokens.
    """

    norms: Mapping[str, float]
    norm: float
    mean_kl: float
    max_kl: float


def check(adapter: Adapter, base: Base) -> Check:
    """Prove that an adapter fits a base and changes its logits.

    The base is as it was afterwards. Raises BaseMismatch if it does not fit or was trained on
    other weights, and AdapterError if it leaves every logit as it was or breaks one.
    """
    from loramix.mixed import MixedModel

    check_fingerprint(adapter, base)
    mixed = MixedModel(base.model)
    try:
        mixed.bind(adapter, base.dtype)
        norms = {
            layer: _norms(pair, mixed.layers[layer].weight) for layer, pair in adapter.pairs.items()
        }
        before, after = _probe(base, mixed, adapter.name)
    finally:
        mixed.release()
    if not after.isfinite().all():
        raise AdapterError(f"{adapter.name!r} makes NaN of the logits of {base.id}; do not use it.")
    if before.equal(after):
        raise AdapterError(
            f"{adapter.name!r} changes no logit of {base.id}: its update vanishes in {base.dtype}; "
            f"train it longer, or open the base in float32."
        )
    divergence = _kl(before, after)
    updates, weights = zip(*norms.values(), strict=True)
    return Check(
        norms={layer: update / weight for layer, (update, weight) in norms.items()},
        norm=math.hypot(*updates) / math.hypot(*weights),
        mean_kl=divergence.mean().item(),
        max_kl=divergence.max().item(),
    )


def _probe(base: Base, mixed: MixedModel, name: str) -> tuple[Tensor, Tensor]:
    """Logits [N, T, V] of base and adapter for rows of random tokens, the same every time."""
    import torch

    from loramix.gates import Gates

    embedding = cast("torch.nn.Embedding", base.model.get_input_embeddings())
    generator = torch.Generator().manual_seed(0)
    shape = (PROBE_ROWS, min(PROBE_TOKENS, base.context))
    tokens = torch.randint(len(embedding.weight), shape, generator=generator).to(base.device)
    gates = Gates((name,), torch.ones(1, 1, 1, device=base.device))
    with torch.inference_mode():
        before = base.model(input_ids=tokens, use_cache=False).logits
        with mixed.active.using(gates):
            after = base.model(input_ids=tokens, use_cache=False).logits
    return before.double(), after.double()


def _kl(before: Tensor, after: Tensor) -> Tensor:
    """KL(before || after) of the next token in nats, [N, T]."""
    log_p, log_q = before.log_softmax(-1), after.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _norms(pair: Pair, weight: Tensor) -> tuple[float, float]:
    """|dW| and |W|."""
    weight = weight.detach().float()
    pair = pair.to(weight.dtype, weight.device)
    return pair.delta(weight).norm().item(), weight.norm().item()


def check_fingerprint(adapter: Adapter, base: Base) -> None:
    """BaseMismatch if the card says that the adapter was trained on other weights."""
    wanted = adapter.card.base_fingerprint
    if wanted and wanted != base.fingerprint:
        raise BaseMismatch(
            f"{adapter.name!r} was trained on {adapter.card.base or 'a base'} with fingerprint "
            f"{wanted}, {base.id} has {base.fingerprint}; open the base it was trained on."
        )


def _refuse_base_name(name: str, base: str) -> None:
    taken = {base.lower(), slug(base), slug(base.rpartition("/")[2])} if base else set()
    if name in taken | {"pocket"}:
        raise AdapterError(
            f"{name!r} is the name of a base, which clients call by that name; give another name."
        )
