"""Build pocket: `python -m recipes.pocket.build`, in stages that are skipped once they are done.

base      tokenizer and base model, from data/text and raw task text
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from recipes.pocket import corpus, pretrain


def base(data: Path, work: Path, folder: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    documents = corpus.documents(data)
    if not (folder / "tokenizer.json").exists():
        pretrain.train_tokenizer(documents, folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokens = pretrain.encode(documents, tokenizer)
    print(f"{len(documents)} documents, {len(tokens) / 1e6:.2f}M tokens", flush=True)
    pretrain.pretrain(tokens, folder, work)


if __name__ == "__main__":
    torch.set_num_threads(2)
    data = Path(os.environ["LORAMIX_DATA"])
    work = Path(os.environ.get("LORAMIX_WORK", "build/pocket"))
    work.mkdir(parents=True, exist_ok=True)
    base(data, work, work / "base")
