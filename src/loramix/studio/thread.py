"""A conversation as it is read: questions, answers, and beside each answer the mix and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nicegui import ui

from loramix.studio.answers import Answer
from loramix.studio.text import as_html

Turn = Mapping[str, Any]  # as the API gives it
ENDS = {"length": "cut at its longest", "cancelled": "stopped"}
NUM_SCORES = 6  # that are shown; the reasons say the rest


class Thread:
    """The turns of one conversation; versions of an answer stand side by side."""

    def __init__(self) -> None:
        self._column = ui.element("div").classes("thread")
        self._sections: list[ui.element] = []  # questions, and versions of answers, in turn
        self.show(())

    @property
    def is_empty(self) -> bool:
        return not self._sections

    def show(self, turns: Sequence[Turn]) -> None:
        """Begin anew with these."""
        self._column.clear()
        self._sections = []
        if not turns:
            self._welcome()
        for turn in turns:
            if turn["role"] == "user":
                self.ask(turn["content"])
            else:
                self.answer().end(turn)

    def ask(self, text: str) -> None:
        """The next question."""
        if self.is_empty:
            self._column.clear()
        with self._section("question"):
            ui.label(text)

    def answer(self) -> Card:
        """Room for an answer to the last question, beside those that it has."""
        last = self._sections[-1]
        with last if "versions" in last.classes else self._section("versions"):
            return Card()

    def take_back(self, card: Card) -> None:
        """An answer that did not come; if it was the only one, its question goes, too."""
        card.remove()
        if not list(self._sections[-1]):
            for _ in range(2):
                self._sections.pop().delete()
        if self.is_empty:
            self._welcome()

    def _section(self, kind: str) -> ui.element:
        with self._column:
            section = ui.element("section").classes(kind)
        self._sections.append(section)
        return section

    def _welcome(self) -> None:
        with self._column, ui.element("div").classes("welcome"):
            ui.label("What would you like to ask?").classes("title")
            ui.label("Each answer tells the mix of adapters that gave it, and why.").classes("hint")


class Card:
    """One answer, under way or at its end."""

    def __init__(self) -> None:
        with ui.element("article").classes("answer waiting") as self._card:
            self._mix = ui.label().classes("mix")
            self._text = ui.html(sanitize=as_html).classes("text")
            self._foot = ui.element("div").classes("foot")

    def grow(self, answer: Answer) -> None:
        """Show it as far as it has come."""
        if self._text.content != answer.text:
            self._text.content = answer.text
            self._card.classes(remove="waiting")
        self._mix.text = answer.chosen.get("mix", "")

    def end(self, turn: Turn) -> None:
        self._card.classes(remove="waiting")
        self._mix.text = turn["mix"]
        if self._text.content != turn["content"]:
            self._text.content = turn["content"]
        self._foot.clear()
        with self._foot:
            ui.label(_facts(turn)).classes("facts")
            if turn["scores"]:
                _why(turn)

    def remove(self) -> None:
        self._card.delete()


def _facts(turn: Turn) -> str:
    seconds = f"{turn['ms'] / 1000:.1f} s" if turn["ms"] else ""
    tokens = f"{turn['completion_tokens']} tokens" if turn["completion_tokens"] else ""
    way = "routed" if turn["scores"] else "chosen"
    return " · ".join(part for part in (way, tokens, seconds, ENDS.get(turn["finish"])) if part)


def _why(turn: Turn) -> None:
    """The router's scores and reasons, behind a word."""
    with ui.element("details"):
        with ui.element("summary"):
            ui.label("Why this mix")
        with ui.element("div").classes("scores"):
            ranked = sorted(turn["scores"].items(), key=lambda item: -item[1])[:NUM_SCORES]
            for name, score in [*ranked, ("(none)", turn["none"] or 0.0)]:
                ui.label(name)
                with ui.element("div").classes("bar"):
                    ui.element("div").style(f"width: {100 * min(max(score, 0), 1):.1f}%")
                ui.label(f"{100 * score:.1f} %").classes("percent")
        with ui.element("ul"):
            for reason in turn["reasons"]:
                with ui.element("li"):
                    ui.label(reason)
