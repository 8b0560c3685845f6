"""Examples as tokens: what the model reads, and which of it it must learn to say."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from loramix.chat import Example, prompt_ids
from loramix.errors import TrainError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label of a token that is read and not learned


@dataclass(frozen=True, slots=True)
class Row:
    """One example as tokens; the answer, with the mark that ends it, begins at `answer_at`."""

    ids: tuple[int, ...]
    answer_at: int

    @property
    def num_learned(self) -> int:
        return len(self.ids) - self.answer_at


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows padded on the left to one length, so that their answers end together.

    Logits are then needed of the last `num_last` positions only, which spares most of the output
    layer: prompts are long, answers short.
    """

    ids: Tensor  # [N, T]
    mask: Tensor  # [N, T], 0 where padded
    positions: Tensor  # [N, T], of each token within its row
    labels: Tensor  # [N, L], the last L tokens; IGNORED where no answer

    @property
    def num_last(self) -> int:
        """Positions whose logits predict a label: L."""
        return self.labels.shape[1]


def tokenise(tokenizer: PreTrainedTokenizerBase, example: Example, max_length: int) -> Row:
    """The prompt exactly as it will be served, then the answer and its end.

    Raises TrainError for an empty answer, a row longer than `max_length` tokens (cutting it would
    teach half an answer), and a chat template that writes a prompt differently once it is answered.
    """
    if not example.answer.strip():
        raise TrainError(
            f"The row {_start(example)} has an empty answer; there is nothing to learn."
        )
    prompt = prompt_ids(tokenizer, example.messages[:-1])
    if not prompt:
        raise TrainError(f"The row with the answer {example.answer!r} has an empty prompt.")
    whole = _whole(tokenizer, example, prompt)
    if whole[: len(prompt)] != prompt:
        raise TrainError(
            f"This chat template changes the prompt of {_start(example)} once it is answered, so "
            f"what is trained would not be what is served; use a template that only appends."
        )
    if len(whole) > max_length:
        raise TrainError(
            f"The row {_start(example)} has {len(whole)} tokens, more than max_length "
            f"{max_length}; raise max_length or drop the row."
        )
    return Row(tuple(whole), len(prompt))


def _whole(
    tokenizer: PreTrainedTokenizerBase, example: Example, prompt: Sequence[int]
) -> list[int]:
    if not tokenizer.chat_template:
        answer = tokenizer(example.answer, add_special_tokens=False)["input_ids"]
        return [*prompt, *answer, tokenizer.eos_token_id]
    turns = [{"role": m.role, "content": m.content} for m in example.messages]
    encoded: Any = tokenizer.apply_chat_template(turns, return_dict=True)
    return list(encoded["input_ids"])


def batches(rows: Sequence[Row], size: int, rng: random.Random, pad: int = 0) -> Iterator[Batch]:
    """One epoch in random order; rows of a batch have similar lengths, so little is padding.

    Every row comes exactly once. Lengths are compared within windows of 16 batches, which keeps
    the order of an epoch random.
    """
    order = rng.sample(range(len(rows)), len(rows))
    windows = [order[i : i + 16 * size] for i in range(0, len(order), 16 * size)]
    groups = []
    for window in windows:
        window.sort(key=lambda i: len(rows[i].ids))
        groups += [window[i : i + size] for i in range(0, len(window), size)]
    rng.shuffle(groups)
    for group in groups:
        yield collate([rows[i] for i in group], pad)


def collate(rows: Sequence[Row], pad: int = 0) -> Batch:
    longest = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), longest), pad)
    mask = torch.zeros_like(ids)
    labels = torch.full((len(rows), max(row.num_learned for row in rows)), IGNORED)
    for n, row in enumerate(rows):
        ids[n, longest - len(row.ids) :] = torch.tensor(row.ids)
        mask[n, longest - len(row.ids) :] = 1
        labels[n, labels.shape[1] - row.num_learned :] = ids[n, longest - row.num_learned :]
    return Batch(ids, mask, (mask.cumsum(1) - 1).clamp(min=0), labels)


def _start(example: Example) -> str:
    text = example.query
    return repr(text if len(text) <= 40 else text[:37] + "...")
