"""The list of conversations: open, begin, rename, delete."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from nicegui import ui

from loramix.errors import LoramixError
from loramix.studio.client import Api

LIST = "/v1/conversations?limit=100"


class Reader(Protocol):
    """What shows a conversation."""

    async def open(self, id: str) -> None: ...

    def begin(self) -> None: ...


class History:
    """The caller's conversations, the last changed first."""

    def __init__(self, api: Api, base: str, reader: Reader) -> None:
        self._api, self._reader = api, reader
        self._heads: list[Any] = []
        self._next: str | None = None  # where the list goes on
        self._current: str | None = None
        with ui.element("div").classes("brand"):
            ui.label("loramix").classes("brand-name")
            ui.label(base).classes("brand-base")
        new = ui.button("New chat", icon="add", color=None, on_click=reader.begin)
        new.props("flat no-caps").classes("new")
        self._list = ui.element("nav").props('aria-label="Conversations"').classes("history")
        self._rename, self._delete = Rename(self._change), Delete(self._remove)

    def show(self, listed: Any) -> None:
        """The list, as the API gives it; one that reads as before is not drawn anew."""
        before = self._as_read
        self._heads, self._next = listed["data"], listed["next"]
        if self._as_read != before:
            self._build()

    @property
    def _as_read(self) -> tuple[object, ...]:
        return (self._next is None, *((head["id"], head["title"]) for head in self._heads))

    def mark(self, id: str | None) -> None:
        """Which one is open."""
        if id != self._current:
            self._current = id
            self._build()

    def _build(self) -> None:
        self._list.clear()
        with self._list:
            for head in self._heads:
                self._row(head)
            if self._next:
                older = ui.button("Older", color=None, on_click=self._older)
                older.props("flat no-caps dense").classes("quiet")

    def _row(self, head: Any) -> None:
        title = head["title"] or "Untitled"
        current = head["id"] == self._current
        with ui.element("div").classes("entry current" if current else "entry"):
            entry = ui.button(title, color=None, on_click=lambda: self._reader.open(head["id"]))
            entry.props("flat no-caps align=left" + (" aria-current=page" if current else ""))
            entry.classes("entry-title")
            more = ui.button(icon="more_horiz", color=None).props("flat round dense size=sm")
            more.props["aria-label"] = f"Rename or delete {title}"
            with more.classes("quiet more"), ui.menu():
                ui.menu_item("Rename", lambda: self._rename.ask(head))
                ui.menu_item("Delete", lambda: self._delete.ask(head))

    async def _older(self) -> None:
        try:
            found = await self._api.ask("GET", f"{LIST}&after={self._next}")
        except LoramixError as error:
            ui.notify(str(error))
            return
        self.show({**found, "data": [*self._heads, *found["data"]]})

    async def _change(self, id: str, title: str) -> None:
        await self._api.ask("PATCH", f"/v1/conversations/{id}", {"title": title})
        self._heads = [{**h, "title": title} if h["id"] == id else h for h in self._heads]
        self._build()

    async def _remove(self, id: str) -> None:
        await self._api.ask("DELETE", f"/v1/conversations/{id}")
        self._heads = [head for head in self._heads if head["id"] != id]
        self._build()
        if id == self._current:
            self._reader.begin()


class Rename:
    """Asks for another title."""

    def __init__(self, change: Callable[[str, str], Awaitable[None]]) -> None:
        self._change = change
        self._id = ""
        with ui.dialog() as self._dialog, ui.card().classes("dialog"):
            self._title = ui.input("Title").props("outlined dense autofocus maxlength=200")
            self._title.on("keydown.enter", self._done)
            self._problem = ui.label().props("role=alert").classes("notice")
            with ui.element("div").classes("actions"):
                ui.button("Cancel", on_click=self._dialog.close).props("flat no-caps")
                ui.button("Rename", on_click=self._done).props("unelevated no-caps")

    def ask(self, head: Any) -> None:
        self._id, self._title.value, self._problem.text = head["id"], head["title"], ""
        self._dialog.open()

    async def _done(self) -> None:
        try:
            await self._change(self._id, (self._title.value or "").strip())
        except LoramixError as error:
            self._problem.text = str(error)
        else:
            self._dialog.close()


class Delete:
    """Asks once before a conversation is gone."""

    def __init__(self, remove: Callable[[str], Awaitable[None]]) -> None:
        self._remove = remove
        self._id = ""
        with ui.dialog() as self._dialog, ui.card().classes("dialog"):
            self._question = ui.label()
            self._problem = ui.label().props("role=alert").classes("notice")
            with ui.element("div").classes("actions"):
                ui.button("Cancel", on_click=self._dialog.close).props("flat no-caps autofocus")
                ui.button("Delete", on_click=self._done).props("unelevated no-caps")

    def ask(self, head: Any) -> None:
        self._id, self._problem.text = head["id"], ""
        self._question.text = f"Delete “{head['title'] or 'Untitled'}” for good?"
        self._dialog.open()

    async def _done(self) -> None:
        try:
            await self._remove(self._id)
        except LoramixError as error:
            self._problem.text = str(error)
        else:
            self._dialog.close()
