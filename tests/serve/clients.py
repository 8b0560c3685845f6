"""Programs that speak OpenAI's API, each asked through its own interface: run by test_clients.py.

    python clients.py litellm|llm|lm_eval URL TOKENIZER

It has an environment of its own (clients.txt): they need other versions of what we use ourselves.
Prints what they made of the answers, as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

USER = [{"role": "user", "content": "the cat"}]
MIX = "banking:0.45+sql:0.55"


def use_litellm(url: str, tokenizer: str) -> dict[str, Any]:
    import litellm

    asked = {"api_base": f"{url}/v1", "api_key": "none", "messages": USER, "max_tokens": 8}
    whole = litellm.completion(model=f"openai/{MIX}", temperature=0, **asked)
    stream = litellm.completion(model=f"openai/{MIX}", temperature=0, stream=True, **asked)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    try:
        litellm.completion(model="openai/nobody", **asked)
        refused = ""
    except litellm.NotFoundError as error:
        refused = str(error)
    return {"whole": whole.choices[0].message.content, "stream": text, "refused": refused}


def use_llm(url: str, tokenizer: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        models = f'- {{model_id: mine, model_name: "{MIX}", api_base: "{url}/v1"}}\n'
        Path(folder, "extra-openai-models.yaml").write_text(models)
        environment = os.environ | {"LLM_USER_PATH": folder, "OPENAI_API_KEY": "none"}
        options = ["-o", "temperature", "0", "-o", "max_tokens", "8"]

        def ask(*more: str) -> str:
            command = [str(Path(sys.executable).with_name("llm")), "-m", "mine", *options, *more]
            done = subprocess.run(
                [*command, "the cat"], capture_output=True, check=True, env=environment, text=True
            )
            return done.stdout.removesuffix("\n")

        return {"whole": ask("--no-stream"), "stream": ask()}


def use_lm_eval(url: str, tokenizer: str) -> dict[str, Any]:
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

    def instances(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
        return [
            Instance(request_type=kind, doc={}, arguments=given, idx=idx)
            for idx, given in enumerate(arguments)
        ]

    options = {"model": MIX, "num_concurrent": 2, "max_retries": 1}
    texts = LocalCompletionsAPI(
        base_url=f"{url}/v1/completions",
        tokenizer_backend="huggingface",
        tokenizer=tokenizer,
        batch_size=2,
        **options,
    )
    pairs = [("the cat", " sat"), ("the", " cat on"), ("in a", " hat")]
    until = {"until": ["zzz"], "max_gen_toks": 8, "temperature": 0}
    chats = LocalChatCompletion(base_url=f"{url}/v1/chat/completions", **options)
    chat = json.dumps(USER)
    from lm_eval.models.api_models import JsonChatStr

    return {
        "scores": texts.loglikelihood(instances("loglikelihood", *pairs)),
        "texts": texts.generate_until(instances("generate_until", ("the cat", until))),
        "chats": chats.generate_until(
            instances("generate_until", (JsonChatStr(chat), dict(until)))
        ),
    }


if __name__ == "__main__":
    name, url, tokenizer = sys.argv[1:]
    print(json.dumps(globals()[f"use_{name}"](url, tokenizer)))
