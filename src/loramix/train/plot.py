"""The losses of a run as a plot; needs matplotlib, the `eval` extra."""

from __future__ import annotations

import io
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from loramix.errors import TrainError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CAN_PLOT = find_spec("matplotlib") is not None
COLOURS = ("#3b6fd4", "#d97706", "#0f9488", "#be3a8a", "#7c3aed", "#15803d", "#c2410c", "#64748b")


def check_plots() -> None:
    """TrainError, before anything is learned, if nothing could be drawn."""
    if not CAN_PLOT:
        raise TrainError(
            "plot_loss needs matplotlib; pip install 'loramix[eval]', or leave it out."
        )


def loss_plot(log: Sequence[dict[str, Any]]) -> str:
    """An SVG of a trainer log's losses by step: a line an expert, dots where it was validated.

    Empty if the log has no losses. The same log gives the same bytes.
    """
    if not log:
        return ""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(entry["expert"] for entry in log))
    with rc_context({"svg.hashsalt": "loramix", "svg.fonttype": "none"}):
        canvas = Figure(figsize=(7, 3.6), layout="constrained")
        axes = canvas.subplots()
        for n, name in enumerate(names):
            own = [entry for entry in log if entry["expert"] == name]
            _draw(axes, own, name if len(names) > 1 else "", COLOURS[n % len(COLOURS)])
        axes.set(xlabel="step", ylabel="loss, nats per learned token", ylim=(0, None))
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=9)
        text = io.StringIO()
        canvas.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def _draw(axes: Axes, own: Sequence[dict[str, Any]], name: str, colour: str) -> None:
    training = [(e["current_steps"], e["loss"]) for e in own if "loss" in e]
    validation = [(e["current_steps"], e["eval_loss"]) for e in own if "eval_loss" in e]
    if training:
        label = name or "training"
        axes.plot(*zip(*training, strict=True), color=colour, linewidth=1, alpha=0.6, label=label)
    if validation:
        label = f"{name} validation".strip()
        axes.plot(
            *zip(*validation, strict=True), color=colour, marker="o", markersize=4, label=label
        )
