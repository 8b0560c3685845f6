"""How long a first answer takes, from the shell to the shell, against importing the libraries.

    python benchmarks/cold_start.py [--quick] [--json FILE]

The runs of all commands take turns, so that a busy machine is busy for all of them; medians. The
last column is the ratio to importing torch and transformers, which loads no model class yet.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

PEER = "import torch, transformers"
COMMANDS = {
    PEER: ["-c", PEER],
    "import torch and the Llama class": [
        "-c",
        "import torch; from transformers import LlamaForCausalLM, PreTrainedTokenizerFast",
    ],
    "loramix ask": ["-m", "loramix", "ask", "my card was stolen", "--max-tokens", "16"],
    "loramix ask --mix base": ["-m", "loramix", "ask", "hi", "-m", "base", "--max-tokens", "16"],
}
TARGET = 1.5  # of an answer by pocket, routed


def seconds(words: list[str]) -> float:
    """Wall time of one run."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *words], check=True, capture_output=True)
    return time.perf_counter() - start


def rows(medians: dict[str, float]) -> list[dict[str, object]]:
    return [
        {
            "work": name,
            "figure": round(value / medians[PEER], 3),
            "unit": "x the wall time of the peer",
            "peer": PEER,
            "target": TARGET if name.startswith("loramix ask") else None,
            "better": "lower",
        }
        for name, value in medians.items()
        if name != PEER
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="three rounds instead of nine")
    parser.add_argument("--json", type=Path, help="write the rows here")
    options = parser.parse_args()
    runs = [
        {name: seconds(words) for name, words in COMMANDS.items()}
        for _ in range(3 if options.quick else 9)
    ]
    medians = {name: median(run[name] for run in runs) for name in COMMANDS}
    for name, value in medians.items():
        print(f"{name:34} {value:6.2f} s {value / medians[PEER]:6.2f}")
    if options.json:
        options.json.write_text(json.dumps({"rows": rows(medians)}, indent=2) + "\n", "utf-8")
