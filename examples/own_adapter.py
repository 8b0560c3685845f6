"""Bring an adapter as other programs write it: add it, prove that it acts, ask with it."""

import tempfile
from pathlib import Path

import loramix
from loramix.base import open_base
from loramix.formats import peft
from loramix.library import Library, check
from loramix.lm import POCKET_LIBRARY

with tempfile.TemporaryDirectory() as folder:
    # Stands for a folder that PEFT, Unsloth, Axolotl or LLaMA-Factory saved.
    peft.write(Library(POCKET_LIBRARY).load("sentiment"), Path(folder) / "Mood v2")

    mine = Library(Path(folder) / "library")
    card = mine.add(Path(folder) / "Mood v2")
    found = check(mine.load(card.name), open_base("pocket"))
    print(f"{card.name} moves the next token by {found.mean_kl:.2f} nats on average")

    with loramix.open("pocket", mine.folder) as lm:
        reply = lm.ask("the plot is thin and the jokes are old", mix=f"{card.name}:0.9")
        print(f"{reply.mix}: {reply.text}")
