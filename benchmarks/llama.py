"""llama.cpp's server in a process of its own, for engine.py: a job on each line of the input.

    python llama.py MODEL.gguf SLOTS CONTEXT THREADS [ADAPTER.gguf ...]

Reads {"prompts", "scales", "num_tokens"} and answers {"cpu_s"} when every prompt has so many tokens
more; the first line it writes says how llama.cpp was built.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import xllamacpp


def open_server(
    path: str, slots: int, context: int, threads: int, adapters: Sequence[str]
) -> xllamacpp.Server:
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_parallel = slots
    params.n_ctx = context
    params.cpuparams.n_threads = threads
    params.cpuparams_batch.n_threads = threads
    params.cache_ram_mib = 0
    params.lora_init_without_apply = True
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(adapter, 0.0) for adapter in adapters]
    params.verbosity = 0
    return xllamacpp.Server(params)


def complete(
    server: xllamacpp.Server, prompt: Sequence[int], scales: Sequence[Any], num_tokens: int
) -> None:
    answer = server.handle_completions(
        {
            "prompt": prompt,
            "max_tokens": num_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "cache_prompt": False,
            "lora": scales,
        }
    )
    assert answer["usage"]["completion_tokens"] == num_tokens, answer


if __name__ == "__main__":
    path, slots, context, threads, *adapters = sys.argv[1:]
    server = open_server(path, int(slots), int(context), int(threads), adapters)
    print(json.dumps({"system": xllamacpp.get_system_info()}), flush=True)
    with ThreadPoolExecutor(int(slots)) as pool:
        for line in sys.stdin:
            work = json.loads(line)
            cpu = time.process_time()
            jobs = [
                pool.submit(complete, server, prompt, scales, work["num_tokens"])
                for prompt, scales in zip(work["prompts"], work["scales"], strict=True)
            ]
            for job in jobs:
                job.result()
            print(json.dumps({"cpu_s": time.process_time() - cpu}), flush=True)
