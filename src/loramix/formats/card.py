"""The card of an adapter as `card.json` in its folder."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from uuid import uuid4

from loramix.adapter import Card
from loramix.errors import FormatError, MixSyntaxError
from loramix.formats.config import load_config
from loramix.formats.fields import Fields
from loramix.formats.folder import CARD
from loramix.mix import check_name


def read_card(folder: str | Path) -> Card:
    """The card in an adapter's folder. FormatError if there is none or it cannot be right."""
    file = Path(folder) / CARD
    values = load_config(file)
    get = Fields(values, str(file))
    if unknown := values.keys() - {field.name for field in fields(Card)}:
        raise FormatError(f"{file}: unknown field {', '.join(sorted(unknown))}; take it out.")
    try:
        name = check_name(get.text("name"))
    except MixSyntaxError as error:
        raise FormatError(f"{file}: {error}") from error
    return Card(
        name=name,
        description=get.text("description"),
        skills=get.texts("skills"),
        examples=get.texts("examples"),
        weight=get.number("weight", 1.0),
        base=get.text("base"),
        base_fingerprint=get.text("base_fingerprint"),
        licence=get.text("licence"),
        scores=get.numbers("scores"),
        system_prompt=get.text("system_prompt"),
    )


def write_card(card: Card, folder: str | Path) -> None:
    """Replace the card in an adapter's folder, whole or not at all."""
    place = Path(folder) / CARD
    new = place.with_name(f".{CARD}.{uuid4().hex[:8]}")
    try:
        new.write_text(
            json.dumps(asdict(card), indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        new.replace(place)
    finally:
        new.unlink(missing_ok=True)
