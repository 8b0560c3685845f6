"""A fader: a slider that keyboards and screen readers know as one."""

from __future__ import annotations

from nicegui.elements.mixins.value_element import ValueElement


class Fader(ValueElement[float], component="fader.js"):
    """From 0 to `most`. `value` follows the hand; what the server sets moves the fader."""

    LOOPBACK = False  # the browser shows the hand's value by itself

    def __init__(self, label: str, *, most: float, step: float) -> None:
        super().__init__(value=0.0, throttle=0.05)
        self._props["max"] = most
        self._props["step"] = step
        self._props["aria-label"] = label
