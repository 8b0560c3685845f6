"""One open chat page: the conversations, the one that is read, the composer, the desk."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import Any

from nicegui import background_tasks, ui
from starlette.requests import Request

from loramix.errors import LoramixError
from loramix.mix import Mix
from loramix.studio.answers import Answer, Answers
from loramix.studio.client import Api
from loramix.studio.desk import COOKIE, Desk
from loramix.studio.history import LIST, History
from loramix.studio.thread import Card, Thread

HERE = Path(__file__).parent
TICK_S = 0.08  # between two looks at an answer under way
TITLE = 48  # letters of a question that name its conversation
THEMES = {"auto": None, "light": False, "dark": True}


async def open_page(api: Api, answers: Answers, request: Request) -> None:
    """Build the page of a request. Raises what the API does."""
    models = (await api.ask("GET", "/v1/models"))["data"]
    listed = await api.ask("GET", LIST)
    page = Page(api, answers, models, request.cookies)
    page.history.show(listed)
    if id := request.query_params.get("chat"):
        await page.open(id)


class Page:
    """What is on the screen, and what a click or a key does."""

    def __init__(
        self, api: Api, answers: Answers, models: list[Any], cookies: Mapping[str, str]
    ) -> None:
        self._api, self._answers = api, answers
        self._client = ui.context.client
        self._id: str | None = None  # of the conversation; None until its first question
        self._base = models[0]["id"]
        self._tasks: set[asyncio.Task[None]] = set()
        self._client.on_connect(lambda: ui.run_javascript("restoreDraft()"))
        self._client.on_delete(self._leave)
        ui.add_css(HERE / "page.css")
        ui.add_head_html(f"<script>{(HERE / 'page.js').read_text('utf-8')}</script>")
        ui.colors(primary="#0f766e")
        self._build_history(cookies.get("loramix_theme", "auto"))
        self._build_desk(models, cookies.get(COOKIE, ""))
        self._build_middle()
        self._show_state()

    async def open(self, id: str) -> None:
        """Show a conversation, and the answer that is under way in it."""
        try:
            found = await self._api.ask("GET", f"/v1/conversations/{id}")
        except LoramixError as error:
            self._notice.text = str(error)
            return
        self._go_to(id, found["title"])
        self._thread.show(found["turns"])
        if answer := self._answers.of(id):
            if answer.question is not None:
                self._thread.ask(answer.question)
            self._start(self._follow(id, answer, self._thread.answer()))
        self._show_state()

    def begin(self) -> None:
        """An empty conversation; it is made with its first question."""
        self._go_to(None, "")
        self._thread.show([])
        self._show_state()

    async def send(self, text: str) -> None:
        question = text.strip()
        if not question or self._is_busy:
            return
        try:
            if self._id is None:
                await self._create(question)
            assert self._id is not None
            path = f"/v1/conversations/{self._id}/turns"
            asked = {"content": question, "mix": self._desk.choice}
            answer = self._answers.begin(self._id, question, self._api.events(path, asked))
        except LoramixError as error:
            self._notice.text = str(error)
            return
        self._composer.value = ""
        self._thread.ask(question)
        self._watch(self._id, answer)

    async def again(self) -> None:
        """Answer the last question once more, with what the desk says now."""
        if self._id is None or self._is_busy:
            return
        path = f"/v1/conversations/{self._id}/regenerate"
        events = self._api.events(path, {"mix": self._desk.choice})
        try:
            answer = self._answers.begin(self._id, None, events)
        except LoramixError as error:
            self._notice.text = str(error)
            return
        self._watch(self._id, answer)

    async def stop(self) -> None:
        if self._id is not None and (answer := self._answers.of(self._id)):
            await answer.stop()

    @property
    def _is_busy(self) -> bool:
        return self._id is not None and self._answers.of(self._id) is not None

    async def _create(self, question: str) -> None:
        title = " ".join("".join(c if c.isprintable() else " " for c in question).split())
        title = title if len(title) <= TITLE else title[: TITLE - 1].rstrip() + "…"
        made = await self._api.ask("POST", "/v1/conversations", {"title": title})
        self._go_to(made["id"], title)
        await self._list()

    async def _list(self) -> None:
        try:
            self.history.show(await self._api.ask("GET", LIST))
        except LoramixError as error:  # the list is as it was
            self._notice.text = str(error)

    def _go_to(self, id: str | None, title: str) -> None:
        self._id = id
        self._notice.text = ""
        self._title.text = title or "New chat"
        self.history.mark(id)
        ui.navigate.history.replace(f"/?chat={id}" if id else "/")

    def _watch(self, id: str, answer: Answer) -> None:
        """Follow an answer that this page asked for; it goes on while the page is open."""
        self._notice.text = ""
        self._start(self._hold(answer))
        self._start(self._follow(id, answer, self._thread.answer()))
        self._show_state()

    async def _hold(self, answer: Answer) -> None:
        with answer.watched():
            await answer.ended()

    async def _follow(self, id: str, answer: Answer, card: Card) -> None:
        with answer.watched(), self._client:
            while not answer.is_over and self._id == id:
                card.grow(answer)
                await asyncio.sleep(TICK_S)
            if self._id != id:
                return
            self._finish(answer, card)
            await self._list()

    def _finish(self, answer: Answer, card: Card) -> None:
        if answer.is_lost:
            self._thread.take_back(card)
            if answer.question is not None:
                self._composer.value = self._composer.value or answer.question
        else:
            card.end(answer.as_turn())
            self._desk.show(Mix.parse(answer.chosen["mix"]))
        self._notice.text = answer.error
        self._show_state()

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = background_tasks.create(work, name="loramix page")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _leave(self) -> None:
        for task in self._tasks:
            task.cancel()

    def _show_state(self) -> None:
        """What can be done now, and with which mix."""
        self._send.set_visibility(not self._is_busy)
        self._stop.set_visibility(self._is_busy)
        self._again.set_visibility(not (self._thread.is_empty or self._is_busy))
        self._again.text = f"Again with {self._desk.choice}"
        self._pill.text = f"Mix: {self._desk.choice}"
        self._status.text = "Answering" if self._is_busy else ""

    def _build_history(self, theme: str) -> None:
        self._left = ui.left_drawer(bordered=True).props("width=272").classes("side")
        self._theme = theme if theme in THEMES else "auto"
        self._dark = ui.dark_mode(THEMES[self._theme])
        with self._left:
            self.history = History(self._api, self._base, self)
            with ui.element("div").classes("side-foot"):
                self._theme_button = ui.button(
                    icon="contrast", color=None, on_click=self._next_theme
                )
                self._theme_button.props("flat no-caps dense").classes("quiet")
                self._theme_button.text = f"Theme: {self._theme}"
                if self._api.has_key:
                    with ui.element("form").props('method="post" action="/sign-out"'):
                        out = ui.button("Sign out", icon="logout", color=None)
                        out.props("flat no-caps dense type=submit").classes("quiet")

    def _next_theme(self) -> None:
        names = [*THEMES]
        self._theme = names[(names.index(self._theme) + 1) % len(names)]
        self._dark.value = THEMES[self._theme]
        self._theme_button.text = f"Theme: {self._theme}"
        kept = f"loramix_theme={self._theme}; max-age=31536000; samesite=strict"
        ui.run_javascript(f"document.cookie = '{kept}'")

    def _build_desk(self, models: list[Any], kept: str) -> None:
        self._right = ui.right_drawer(bordered=True).props("width=288").classes("side desk")
        adapters = {m["id"]: m["description"] for m in models[1:] if m["id"] != "auto"}
        has_router = any(model["id"] == "auto" for model in models)
        with self._right:
            self._desk = Desk(
                adapters, has_router=has_router, kept=kept, on_change=self._show_state
            )

    def _build_middle(self) -> None:
        with ui.element("main").classes("middle"):
            with ui.element("header").classes("top"):
                menu = ui.button(icon="menu", color=None, on_click=self._left.toggle)
                menu.props('flat round dense aria-label="Conversations"').classes("quiet")
                self._title = ui.label("New chat").classes("top-title")
            with ui.element("div").classes("scroller"):
                self._thread = Thread()
            self._build_composer()

    def _build_composer(self) -> None:
        with ui.element("footer").classes("composer"):
            self._notice = ui.label().props("role=alert").classes("notice")
            self._again = ui.button(icon="refresh", color=None, on_click=self.again)
            self._again.props("flat no-caps dense").classes("quiet again")
            with ui.element("div").classes("box"):
                self._composer = ui.textarea(placeholder="Ask something")
                self._composer.props('autogrow borderless dense autofocus aria-label="Question"')
                self._composer.on(
                    "keydown",
                    lambda event: self.send(event.args),
                    js_handler="(e) => sends(e) && (e.preventDefault(), emit(e.target.value))",
                )
                with ui.element("div").classes("actions"):
                    self._pill = ui.button(icon="tune", color=None, on_click=self._right.toggle)
                    self._pill.props("flat no-caps dense").classes("quiet pill")
                    self._send = ui.button(
                        icon="arrow_upward", on_click=lambda: self.send(self._composer.value or "")
                    ).props('round unelevated aria-label="Send"')
                    self._stop = ui.button(icon="stop", on_click=self.stop)
                    self._stop.props('round unelevated aria-label="Stop"').classes("stop")
            self._status = ui.label().props("role=status").classes("unseen")
