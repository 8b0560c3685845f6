"""The mixing desk: one fader for each adapter, and a switch that leaves them to the router."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import quote, unquote

from nicegui import ui

from loramix.errors import MixError, UnknownAdapter
from loramix.mix import Mix
from loramix.studio.fader import Fader

COOKIE = "loramix_desk"  # so that a reload finds the faders where they were
FULL = 1.5  # where a fader ends; a mix that is typed may go beyond
STEP = 0.05


class Desk:
    """What answers next. The faders show `mix`: under `is_auto` the one that was routed last.

    Whoever moves a fader takes over from the router.
    """

    def __init__(
        self,
        adapters: Mapping[str, str],
        *,
        has_router: bool,
        kept: str,
        on_change: Callable[[], Any],
    ) -> None:
        self._adapters = adapters  # name: description
        self._has_router = has_router
        self._on_change = on_change
        self.is_auto, self.mix = _restored(unquote(kept), adapters, has_router)
        self._faders: dict[str, Fader] = {}
        self._weights: dict[str, ui.label] = {}
        self._is_moving = False  # by us, not by hand
        self._build()
        self._move()

    @property
    def choice(self) -> str:
        """The mix as a request says it."""
        return "auto" if self.is_auto else str(self.mix)

    def show(self, mix: Mix) -> None:
        """The router chose this."""
        if self.is_auto:
            self.mix = mix
            self._changed()

    def _build(self) -> None:
        ui.label("Mix").classes("heading")
        if self._has_router:
            self._switch = ui.switch("Auto", on_change=self._on_switch).classes("auto")
            ui.label(
                "The router chooses a mix for each question. Move a fader to take over."
            ).classes("hint")
        with ui.element("div").classes("faders"):
            for name, description in self._adapters.items():
                self._fader(name, description)
        if not self._adapters:
            ui.label("The library has no adapters: the base answers by itself.").classes("hint")
            return
        self._name = ui.input("The mix by name").props("outlined dense hide-bottom-space")
        self._name.classes("mix-name").on("keydown.enter", self._on_name).on("blur", self._on_name)

    def _fader(self, name: str, description: str) -> None:
        with ui.element("div").classes("fader"):
            with ui.element("div").classes("fader-head"):
                ui.label(name).classes("fader-name")
                self._weights[name] = ui.label().classes("weight")
            fader = Fader(f"Weight of {name}", most=FULL, step=STEP).mark(name)
            fader.on_value_change(lambda event: self._on_fader(name, event.value))
            if description:
                brief = ui.label(description.partition(". ")[0]).classes("hint description")
                brief.props["title"] = description
        self._faders[name] = fader

    def _on_switch(self, event: Any) -> None:
        if not self._is_moving:
            self.is_auto = bool(event.value)
            self._changed()

    def _on_fader(self, name: str, weight: float) -> None:
        if not self._is_moving:
            self.is_auto = False
            self.mix = Mix({**self.mix, name: weight})
            self._changed()

    def _on_name(self) -> None:
        text = (self._name.value or "").strip()
        try:
            is_auto, mix = self._read(text or "base")
        except MixError as error:
            self._name.props(f'error error-message="{_attribute(str(error))}"')
            return
        self._name.props(remove="error error-message")
        if (is_auto, mix) != (self.is_auto, self.mix):
            self.is_auto, self.mix = is_auto, mix
            self._changed()

    def _read(self, text: str) -> tuple[bool, Mix]:
        if text == "auto" and self._has_router:
            return True, self.mix
        mix = Mix.parse(text)
        for name in mix:
            if name not in self._adapters:
                raise UnknownAdapter(name, [*self._adapters])
        return False, mix

    def _changed(self) -> None:
        self._move()
        kept = quote(f"{'auto' if self.is_auto else 'hand'}|{self.mix}")
        ui.run_javascript(f"document.cookie = '{COOKIE}={kept}; max-age=31536000; samesite=strict'")
        self._on_change()

    def _move(self) -> None:
        """Put everything where the mix is."""
        self._is_moving = True
        if self._has_router:
            self._switch.value = self.is_auto
        for name, fader in self._faders.items():
            weight = self.mix.get(name, 0.0)
            fader.value = min(max(weight, 0.0), FULL)
            self._weights[name].text = f"{weight:.4f}".rstrip("0").rstrip(".")
            self._weights[name].classes(add="on" if weight else "", remove="" if weight else "on")
        if self._adapters:
            self._name.value = str(self.mix)
        self._is_moving = False


def _restored(kept: str, adapters: Mapping[str, str], has_router: bool) -> tuple[bool, Mix]:
    """The desk as a cookie has it, as far as its adapters are still there."""
    way, _, name = kept.partition("|")
    try:
        mix = Mix.parse(name or "base")
    except MixError:
        mix = Mix()
    mix = Mix({name: weight for name, weight in mix.items() if name in adapters})
    return has_router and way != "hand", mix


def _attribute(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', "'")
