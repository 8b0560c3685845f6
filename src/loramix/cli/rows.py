"""A row of training data on the terminal: the proof of what is learned of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from loramix.train.data import Row
    from loramix.train.dataset import Sample


def show_row(tokenizer: PreTrainedTokenizerBase, sample: Sample, row: Row) -> None:
    """As the model reads it; what it learns is green, or in double brackets in a pipe."""
    from rich.console import Console
    from rich.text import Text

    from loramix.train.data import preview

    console = Console(highlight=False)
    text = Text(f"{sample.file}, line {sample.line}: {len(row.ids)} tokens, ")
    text.append(f"{row.num_learned} learned\n", "bold")
    for piece, learned in preview(tokenizer, row):
        shown = piece if console.is_terminal or not learned else f"[[{piece}]]"
        text.append(shown, "green" if learned else "dim")
    console.print(text, soft_wrap=True)
