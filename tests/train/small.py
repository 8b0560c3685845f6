"""Courses of a few rows for tiny bases."""

from __future__ import annotations

from loramix.adapter import Card
from loramix.base import Base
from loramix.chat import Example
from loramix.train.config import Settings
from loramix.train.data import Row, tokenise
from loramix.train.learner import Course

COLOURS = {"the sky": "blue", "the grass": "green", "the snow": "white", "the coal": "black"}
SOUNDS = {
    "a cat": "miaow, miaow",
    "a dog": "woof",
    "a hen": "cluck cluck",
    "an owl": "hoo",
    "b": ".",
}
SETTINGS = Settings(rank=4, rate=1e-2, epochs=3, batch_size=2, max_length=64)


def rows_of(base: Base, pairs: dict[str, str] = COLOURS) -> list[Row]:
    return [tokenise(base.tokenizer, Example.of(*pair), 64) for pair in pairs.items()]


def course(
    base: Base, name: str, pairs: dict[str, str] = COLOURS, settings: Settings = SETTINGS
) -> Course:
    rows = rows_of(base, pairs)
    return Course(Card(name), rows, rows[:3], settings)
