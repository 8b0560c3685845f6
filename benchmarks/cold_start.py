"""How long a first answer takes, from the shell to the shell, against importing the libraries.

    python benchmarks/cold_start.py [rounds]

The rounds of all commands take turns, so that a busy machine is busy for all of them. CPU seconds
are user and system time of the process; wall seconds are the best round's.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

COMMANDS = {
    "import torch, transformers": ["-c", "import torch, transformers"],
    "import the Llama classes": [
        "-c",
        "import torch; from transformers import LlamaForCausalLM, PreTrainedTokenizerFast",
    ],
    "loramix ask": ["-m", "loramix", "ask", "my card was stolen", "--max-tokens", "16"],
    "loramix ask --mix base": ["-m", "loramix", "ask", "hi", "-m", "base", "--max-tokens", "16"],
}


def measure(words: list[str]) -> tuple[float, float]:
    """Wall and CPU seconds of one run."""
    before, start = os.times(), time.perf_counter()
    subprocess.run([sys.executable, *words], check=True, capture_output=True)
    after = os.times()
    cpu = after.children_user + after.children_system
    return time.perf_counter() - start, cpu - before.children_user - before.children_system


if __name__ == "__main__":
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    runs = [{name: measure(words) for name, words in COMMANDS.items()} for _ in range(rounds)]
    best = {name: [min(run[name][k] for run in runs) for k in (0, 1)] for name in COMMANDS}
    wall, cpu = best["import torch, transformers"]
    print(f"{'':28}  wall s  ratio   CPU s  ratio")
    for name, (w, c) in best.items():
        print(f"{name:28} {w:7.2f} {w / wall:6.2f} {c:7.2f} {c / cpu:6.2f}")
