"""Runs the commands a document shows and pastes what they print back into it.

A block is fenced with ```console; a line "$ loramix ..." is a command, the lines up to the next
command are its output. `make readme` refreshes the README, `tests/test_docs.py` runs every block.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

BLOCK = re.compile(r"```console\n(.*?)```", re.DOTALL)


def commands(document: str) -> list[str]:
    """Every command line of a document's console blocks, without the "$ "."""
    lines = "".join(BLOCK.findall(document)).splitlines()
    return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]


def refreshed(document: str, run: Callable[[str], str]) -> str:
    """The document with the output of each command replaced by what `run` returns for it."""

    def block(match: re.Match[str]) -> str:
        shown = [f"$ {line}\n{run(line).rstrip()}".rstrip() for line in commands(match[0])]
        return "```console\n" + "\n".join(shown) + "\n```"

    return BLOCK.sub(block, document)


def run(command: str) -> str:
    """What a command prints; CalledProcessError if it fails."""
    words = shlex.split(command)
    if words[0] == "loramix":
        words = [sys.executable, "-m", *words]
    wide = os.environ | {"COLUMNS": "120"}
    done = subprocess.run(words, check=True, capture_output=True, text=True, env=wide)
    return "\n".join(line.rstrip() for line in done.stdout.splitlines())


if __name__ == "__main__":
    for name in sys.argv[1:]:
        path = Path(name)
        path.write_text(refreshed(path.read_text("utf-8"), run), "utf-8")
