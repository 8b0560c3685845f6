"""llama.cpp in this process: the logarithms of its next-token probabilities, and its tokens."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

xllamacpp = pytest.importorskip("xllamacpp", reason="the extra llamacpp is not installed")
LETTER = 40  # a token of one ASCII letter


class LlamaCpp:
    """A server over one GGUF file and adapters beside it, each at a scale per request."""

    def __init__(self, model: Path, adapters: Sequence[Path] = (), context: int = 128) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = str(model)
        params.n_parallel = 1
        params.n_ctx = context
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.cache_ram_mib = 0
        params.warmup = False
        params.fit_params = False
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.verbosity = 0
        params.lora_init_without_apply = True
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(a), 0.0) for a in adapters]
        self.server = xllamacpp.Server(params)
        self.num_adapters = len(adapters)

    def complete(
        self, tokens: Sequence[int], scales: Mapping[int, float] | None = None, **more: object
    ) -> dict[str, object]:
        scales = scales or {}
        lora = [{"id": i, "scale": scales.get(i, 0.0)} for i in range(self.num_adapters)]
        asked = {"prompt": list(tokens), "temperature": 0.0, "cache_prompt": False, "lora": lora}
        return self.server.handle_completions(asked | more)

    def next_logprobs(
        self, tokens: Sequence[int], size: int, scales: Mapping[int, float] | None = None
    ) -> Tensor:
        """[V], float64, of the token after `tokens`, before anything is done to them."""
        whole = [[LETTER, 1000.0]]  # answered with, as half a character has no entry
        more = {"max_tokens": 1, "logprobs": size, "ignore_eos": True, "logit_bias": whole}
        answer = self.complete(tokens, scales, **more)
        found = torch.full((size,), float("nan"), dtype=torch.float64)
        for entry in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            found[entry["id"]] = entry["logprob"]
        return found

    def tokenize(self, text: str, *, special: bool = True) -> list[int]:
        body = json.dumps({"content": text, "add_special": special, "parse_special": True})
        request = urllib.request.Request(
            f"{self.server.listening_address}/tokenize",
            body.encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)["tokens"]
