"""llama.cpp's server in a process of its own, for engine.py: a job on each line of the input.

    python llama.py MODEL.gguf SLOTS CONTEXT THREADS [ADAPTER.gguf ...] [--native LLAMA_SERVER]

Reads {"prompts", "scales", "num_tokens"} and answers {"cpu_s"} when every prompt has so many tokens
more; the first line it writes says how llama.cpp was built. Without `--native` it is the wheel of
xllamacpp; with it, a `llama-server` that native_llama.sh built for this very CPU.
"""

from __future__ import annotations

import argparse
import atexit
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

Complete = Callable[[dict[str, Any]], int]  # -> the tokens that came


def open_wheel(options: argparse.Namespace) -> tuple[str, Complete, Callable[[], float]]:
    """How it was built, what completes a prompt, and the CPU seconds used so far."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = options.model
    params.n_parallel = options.slots
    params.n_ctx = options.context
    params.cpuparams.n_threads = options.threads
    params.cpuparams_batch.n_threads = options.threads
    params.cache_ram_mib = 0
    params.lora_init_without_apply = True
    params.lora_adapters = [
        xllamacpp.CommonAdapterLoraInfo(adapter, 0.0) for adapter in options.adapters
    ]
    params.verbosity = 0
    server = xllamacpp.Server(params)

    def complete(body: dict[str, Any]) -> int:
        return int(server.handle_completions(body)["usage"]["completion_tokens"])

    return xllamacpp.get_system_info(), complete, time.process_time


def open_native(options: argparse.Namespace) -> tuple[str, Complete, Callable[[], float]]:
    """The same of a server of its own; it ends with this process."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [options.native, "--model", options.model, "--port", port, "--verbosity", 0]
    command += ["--parallel", options.slots, "--ctx-size", options.context, "--cache-ram", 0]
    command += ["--threads", options.threads, "--threads-batch", options.threads]
    command += ["--lora-init-without-apply"]
    command += [word for adapter in options.adapters for word in ("--lora", adapter)]
    server = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL)
    atexit.register(server.terminate)
    address = f"http://127.0.0.1:{port}"

    def complete(body: dict[str, Any]) -> int:
        asked = urllib.request.Request(
            f"{address}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(asked) as answer:
            return int(json.load(answer)["usage"]["completion_tokens"])

    def cpu_s() -> float:
        times = Path(f"/proc/{server.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK")

    while server.poll() is None:
        try:
            urllib.request.urlopen(f"{address}/health").close()
        except urllib.error.URLError:
            time.sleep(0.2)
        else:
            return f"built for this CPU ({options.native})", complete, cpu_s
    raise SystemExit(f"{options.native} ended with {server.returncode}; its reason is above.")


def run(complete: Complete, prompt: Sequence[int], scales: Sequence[Any], num_tokens: int) -> None:
    body = {
        "prompt": prompt,
        "max_tokens": num_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "cache_prompt": False,
        "lora": scales,
    }
    came = complete(body)
    assert came == num_tokens, came


def options_of(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    for number in ("slots", "context", "threads"):
        parser.add_argument(number, type=int)
    parser.add_argument("adapters", nargs="*")
    parser.add_argument("--native", type=Path)
    return parser.parse_args(words)


def main(options: argparse.Namespace) -> None:
    system, complete, cpu_s = open_native(options) if options.native else open_wheel(options)
    print(json.dumps({"system": system}), flush=True)
    with ThreadPoolExecutor(options.slots) as pool:
        for line in sys.stdin:
            work = json.loads(line)
            cpu = cpu_s()
            jobs = [
                pool.submit(run, complete, prompt, scales, work["num_tokens"])
                for prompt, scales in zip(work["prompts"], work["scales"], strict=True)
            ]
            for job in jobs:
                job.result()
            print(json.dumps({"cpu_s": cpu_s() - cpu}), flush=True)


if __name__ == "__main__":
    main(options_of(sys.argv[1:]))
