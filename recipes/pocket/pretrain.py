"""The base: a tokenizer and a small Llama, trained from nothing in one pass over the corpus."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TOKENS_PER_STEP = 8192
STEPS = 780  # 6.4M tokens: what two cores read in three quarters of an hour
WARMUP, DECAY = 40, 0.4  # steps; share of the run in which the rate falls to nothing
LONG_FROM = 0.85  # share of the run after which windows are twice as long
MUON_RATE, ADAM_RATE = 0.02, 3e-3


def train_tokenizer(documents: Sequence[str], folder: Path, vocab: int = 6144) -> None:
    """A byte-level BPE; digits stay apart so that numbers are spelled, not remembered."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Split(Regex("_"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(documents, trainer)
    wrapped: Any = PreTrainedTokenizerFast
    tokenizer = wrapped(tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)


def encode(documents: Sequence[str], folder: Path) -> np.ndarray[Any, Any]:
    """All documents one after another, each followed by <|endoftext|>."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    end = SPECIAL.index("<|endoftext|>")
    ids: list[int] = []
    for start in range(0, len(documents), 1000):
        for document in tokenizer(list(documents[start : start + 1000]))["input_ids"]:
            ids += [*document, end]
    return np.array(ids, dtype=np.uint16)


def model_config(vocab: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=SPECIAL.index("<|end|>"),
        pad_token_id=0,
    )


def pretrain(tokens: np.ndarray[Any, Any], folder: Path, work: Path, *, seed: int = 0) -> None:
    """One pass over `tokens`, resumed from `work` if a checkpoint is there; the model in `folder`.

    Matrices inside the layers learn by Muon (https://kellerjordan.github.io/posts/muon), which
    reaches a loss in fewer steps than Adam; the embedding and the norms by AdamW.
    """
    torch.manual_seed(seed)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = LlamaForCausalLM(model_config(len(tokenizer)))
    steps = min(STEPS, len(tokens) // TOKENS_PER_STEP)
    optimizers = _optimizers(model)
    first = _resume(work / "pretrain.pt", model, optimizers)
    began = time.monotonic()
    for step in range(first, steps):
        _set_rate(optimizers, step, steps)
        loss = _step(model, _window(tokens, step, steps))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if step % 20 == 0:
            rate = (step - first + 1) * TOKENS_PER_STEP / (time.monotonic() - began)
            print(f"pretrain {step}/{steps} loss {loss:.3f} {rate:.0f} tokens/s", flush=True)
        if step % 100 == 99:
            _checkpoint(work / "pretrain.pt", model, optimizers, step + 1)
    model.generation_config.do_sample = False
    model.bfloat16().save_pretrained(folder)


def _window(tokens: np.ndarray[Any, Any], step: int, steps: int) -> torch.Tensor:
    length = 1024 if step >= LONG_FROM * steps else 512
    part = tokens[step * TOKENS_PER_STEP : (step + 1) * TOKENS_PER_STEP]
    return torch.from_numpy(part.astype(np.int64)).view(-1, length)


def _step(model: LlamaForCausalLM, windows: torch.Tensor) -> float:
    """Gradients of the mean loss, in two halves to bound memory."""
    total = 0.0
    for half in windows.chunk(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=half, labels=half, use_cache=False).loss / 2
        loss.backward()
        total += loss.item()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    return total


def _optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    matrices: list[torch.nn.Parameter] = []
    rest: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and "layers" in name else rest).append(parameter)
    muon = torch.optim.Muon(matrices, lr=MUON_RATE, weight_decay=0.01, momentum=0.95)
    adam = torch.optim.AdamW(rest, lr=ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    return [muon, adam]


def _set_rate(optimizers: Sequence[torch.optim.Optimizer], step: int, steps: int) -> None:
    """Up in `WARMUP` steps, flat, then down in a line over the last `DECAY` of the run."""
    share = min(1.0, (step + 1) / WARMUP, (steps - step) / math.ceil(DECAY * steps))
    for optimizer, rate in zip(optimizers, (MUON_RATE, ADAM_RATE), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate * share


def _checkpoint(
    path: Path, model: LlamaForCausalLM, optimizers: Sequence[torch.optim.Optimizer], step: int
) -> None:
    state = {
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "step": step,
    }
    torch.save(state, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def _resume(
    path: Path, model: LlamaForCausalLM, optimizers: Sequence[torch.optim.Optimizer]
) -> int:
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return int(state["step"])
