"""Build pocket in stages; a stage that is done is skipped, one that was cut short goes on.

LORAMIX_DATA=... python -m recipes.pocket all        # about two hours on two CPU cores
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import torch
import typer

from loramix.folders import POCKET
from loramix.library import Library
from recipes.pocket import corpus, history, presets, pretrain, report, routing, turns
from recipes.pocket.experts import install, learn, write_rows
from recipes.pocket.tasks import TASKS

HERE = Path(__file__).parent
app = typer.Typer(add_completion=False, help=__doc__)
Data = Annotated[Path, typer.Option(envvar="LORAMIX_DATA", exists=True, file_okay=False)]
Pocket = Annotated[Path, typer.Option(help="Where the finished models go.")]
Work = Annotated[Path, typer.Option(help="Where checkpoints live while a stage runs.")]


@app.command()
def base(data: Data, pocket: Pocket = POCKET, work: Work = Path("build/pocket")) -> None:
    """Train the tokenizer and the base model."""
    folder = pocket / "base"
    if (folder / "model.safetensors").exists():
        return
    work.mkdir(parents=True, exist_ok=True)
    documents = corpus.documents(data)
    if not (folder / "tokenizer.json").exists():
        pretrain.train_tokenizer(documents, folder)
    tokens = pretrain.encode(documents, folder)
    print(f"{len(documents)} documents, {len(tokens) / 1e6:.2f}M tokens", flush=True)
    pretrain.pretrain(tokens, folder, work)


@app.command()
def rows(data: Data, work: Work = Path("build/pocket")) -> None:
    """Write the experts' rows as the files that experts.yaml names."""
    write_rows(data, work / "rows")


@app.command(name="history")
def history_command(data: Data, pocket: Pocket = POCKET, rows: int = 200) -> None:
    """Compare answers over an exact and a kept history."""
    history.run(data, pocket, rows)


@app.command(name="turns")
def turns_command(data: Data, pocket: Pocket = POCKET, count: int = 500) -> None:
    """Count how often the second turn of a conversation is routed right."""
    turns.run(data, pocket, count)


@app.command(name="presets")
def presets_command(data: Data) -> None:
    """Measure what the presets do on and off an expert's own task."""
    presets.run(data)


@app.command()
def experts(data: Data, pocket: Pocket = POCKET, work: Work = Path("build/pocket")) -> None:
    """Learn all experts in one pass, and install them."""
    if set(TASKS) <= set(Library(pocket / "library").names()):
        return
    learn(data, pocket, work)
    install(pocket, work)


@app.command(name="install")
def install_command(pocket: Pocket = POCKET, work: Work = Path("build/pocket")) -> None:
    """Put the experts that `work` has learned in the place of those that are there."""
    install(pocket, work)


@app.command()
def router(data: Data, pocket: Pocket = POCKET) -> None:
    """Fit the router and choose the demo's queries."""
    routing.build(data, pocket)
    report.write_queries(data, pocket)


@app.command()
def router_rows(data: Data, out: Work = Path("build/pocket"), count: int = 100) -> None:
    """Write rows to fit a router on, to evaluate it on, and with answers to measure by."""
    routing.write_rows(data, out, count)


@app.command("report")
def write_report(
    data: Data, pocket: Pocket = POCKET, out: Path = HERE / "RESULTS.md", limit: int | None = None
) -> None:
    """Judge everything on held-out rows and write RESULTS.md."""
    report.run(data, pocket, out, limit)


@app.command("all")
def everything(data: Data, pocket: Pocket = POCKET, work: Work = Path("build/pocket")) -> None:
    """All stages in order."""
    base(data, pocket, work)
    experts(data, pocket, work)
    router(data, pocket)
    write_report(data, pocket)


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    app()
