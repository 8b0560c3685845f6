"""A router's report as one HTML page: figures, plots, and the queries that went wrong.

Everything is inside the one file. The plots need matplotlib, the `eval` extra.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from loramix.errors import BadRequest
from loramix.route.report import NONE, Figure, Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_ROUTES = 30  # in the confusion plot: those with the most errors

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { text-align: left; padding: .2rem .9rem .2rem 0; border-bottom: 1px solid #ddd; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
svg { max-width: 100%; height: auto; }
li { color: #555; }
"""

FIGURES = {
    "accuracy": "exactly the right adapters, or the base",
    "in_scope": "rows of one adapter: it is the first choice",
    "none_recall": "rows of no adapter: left to the base",
    "none_precision": "rows left to the base: they are of no adapter",
    "false_second": "rows of one adapter: a second one joined (lower is better)",
    "mix_exact": "rows of several adapters: exactly these",
    "mix_first": "rows of several adapters: the first choice is one of them",
}


def page(found: Report, title: str) -> str:
    """The whole document."""
    figures = [
        (meaning, *_cells(getattr(found, name)))
        for name, meaning in FIGURES.items()
        if getattr(found, name).n
    ]
    single = [
        ("area under the curve of P(none)", _number(found.none_auroc), "", ""),
        ("expected calibration error", _number(found.calibration_error), "", ""),
        ("one query, p50 and p95 in ms", f"{found.p50_ms:.1f}, {found.p95_ms:.1f}", "", ""),
    ]
    routes = [
        (name, *(_number(value) for value in each[:3]), str(each.n))
        for name, each in found.routes.items()
    ]
    parts = [
        f"<h1>{escape(title)}</h1>",
        _table(("", "share", "95 % interval", "rows"), [*figures, *single]),
        *_plots(found),
        "<h2>Most confused</h2>",
        *(_pair(*each) for each in found.confused),
        "<h2>By adapter</h2>",
        _table(("adapter", "precision", "recall", "F1", "rows"), routes),
    ]
    head = f"<meta charset=utf-8><title>{escape(title)}</title><style>{STYLE}</style>"
    return f"<!doctype html><html lang=en><head>{head}</head><body>{''.join(parts)}</body></html>\n"


def _plots(found: Report) -> list[str]:
    """SVG of coverage against accuracy, said against true shares, and the confusion matrix."""
    try:
        from matplotlib.figure import Figure as Canvas
    except ImportError as error:
        raise BadRequest(
            "The page's plots need matplotlib; pip install 'loramix[eval]', or ask for --json."
        ) from error
    curves = Canvas(figsize=(9, 3.6), layout="constrained")
    left, right = curves.subplots(1, 2)
    _draw_coverage(left, found)
    _draw_reliability(right, found)
    names = _shown(found)
    size = 2.2 + 0.28 * len(names)
    matrix = Canvas(figsize=(size + 1.2, size), layout="constrained")
    _draw_confusion(matrix.subplots(), found, names)
    return [_svg(curves), _svg(matrix)]


def _draw_coverage(axes: Axes, found: Report) -> None:
    if found.coverage:
        axes.plot(*zip(*found.coverage, strict=True), marker="o", markersize=3)
    axes.set(xlabel="share of queries answered, surest first", ylabel="accuracy", xlim=(0, 1.02))
    axes.set_title("Coverage and accuracy", loc="left", fontsize=11)
    axes.grid(alpha=0.3)


def _draw_reliability(axes: Axes, found: Report) -> None:
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    if found.reliability:
        said, true, rows = zip(*found.reliability, strict=True)
        axes.scatter(said, true, s=[12 + 160 * n / max(rows) for n in rows], alpha=0.7)
    axes.set(xlabel="probability it gave", ylabel="share that was right", xlim=(0, 1.02))
    axes.set_title("Calibration (area: rows)", loc="left", fontsize=11)
    axes.grid(alpha=0.3)


def _draw_confusion(axes: Axes, found: Report, names: Sequence[str]) -> None:
    counts = [[found.confusion.get(t, {}).get(c, 0) for c in names] for t in names]
    totals = [max(sum(found.confusion.get(t, {}).values()), 1) for t in names]
    shares = [[n / total for n in row] for row, total in zip(counts, totals, strict=True)]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set(xlabel="first choice", ylabel="truth")
    axes.set_title("Queries (shade: share of their truth)", loc="left", fontsize=11)
    for y, row in enumerate(counts):
        for x, n in enumerate(row):
            if n:
                colour = "white" if shares[y][x] > 0.5 else "black"
                axes.text(x, y, str(n), ha="center", va="center", fontsize=7, color=colour)


def _shown(found: Report) -> list[str]:
    """The routes of the confusion plot: all, or those that take part in the most errors."""
    errors = dict.fromkeys(found.routes, 0)
    for truth, row in found.confusion.items():
        for choice, n in row.items():
            for name in {truth, choice} & {*errors}:
                errors[name] += n * (truth != choice)
    worst = sorted(errors, key=lambda name: (-errors[name], name))[:MOST_ROUTES]
    return sorted(worst, key=lambda name: (name == NONE, name))


def _svg(canvas: Any) -> str:
    text = io.StringIO()
    canvas.savefig(text, format="svg", metadata={"Date": None})
    drawn = text.getvalue()
    return drawn[drawn.index("<svg") :]


def _pair(truth: str, choice: str, queries: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(query)}</li>" for query in queries)
    return f"<p><b>{escape(truth)}</b> taken for <b>{escape(choice)}</b></p><ul>{items}</ul>"


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        kinds = ["", *[" class=n"] * (len(cells) - 1)]
        inside = "".join(
            f"<{tag}{kind}>{escape(cell)}</{tag}>" for kind, cell in zip(kinds, cells, strict=True)
        )
        return f"<tr>{inside}</tr>"

    return f"<table>{line(titles, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def _cells(figure: Figure) -> tuple[str, str, str]:
    interval = f"{figure.low:.3f} to {figure.high:.3f}"
    return _number(figure.value), interval, str(figure.n)


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"
