"""Examples as tokens: what the model reads, and which of it it must learn to say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from loramix.chat import Example, answered_ids, prompt_ids, template_text
from loramix.errors import BadRequest, TrainError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]  # first token and the one after the last
Learned = Literal["answers", "last answer", "all"]


@dataclass(frozen=True, slots=True)
class Row:
    """One example as tokens; those of the spans are learned, the others only read."""

    ids: tuple[int, ...]
    learned: tuple[Span, ...]

    @property
    def num_learned(self) -> int:
        return sum(stop - start for start, stop in self.learned)


def tokenise(
    tokenizer: PreTrainedTokenizerBase,
    example: Example,
    max_length: int,
    *,
    learned: Learned = "answers",
    template: Mapping[str, Any] | None = None,
    truncate: bool = False,
) -> Row:
    """Every answer after the prompt exactly as it will be served, with the mark that ends it.

    An example of one message is plain text to continue: all of it is learned. Raises TrainError for
    an empty answer, a row longer than `max_length` tokens (cutting it teaches half an answer: ask
    for that with `truncate`), and a chat template that writes a prompt differently once it is
    answered.
    """
    if not example.answer.strip() and not example.messages[-1].calls:
        raise TrainError(
            f"The row {_start(example)} has an empty answer; there is nothing to learn."
        )
    try:
        row = _row(tokenizer, example, learned, template)
    except BadRequest as error:
        raise TrainError(f"The row {_start(example)} cannot be a prompt: {error}") from error
    if len(row.ids) > max_length and not truncate:
        raise TrainError(
            f"The row {_start(example)} has {len(row.ids)} tokens, more than the "
            f"{max_length} that it may have; raise that (cutoff_len) or drop the row."
        )
    return _cut(row, max_length, example)


def _row(
    tokenizer: PreTrainedTokenizerBase,
    example: Example,
    learned: Learned,
    template: Mapping[str, Any] | None,
) -> Row:
    messages = example.messages
    if len(messages) == 1:
        text = list(tokenizer(example.answer)["input_ids"])
        return Row((*text, tokenizer.eos_token_id), ((1, len(text) + 1),))
    whole = answered_ids(tokenizer, messages, template)
    if learned == "all":
        return Row(tuple(whole), ((1, len(whole)),))
    answers = [n for n, m in enumerate(messages) if m.role == "assistant"]
    if learned == "last answer" or not tokenizer.chat_template:
        answers = answers[-1:]
    spans = []
    for n in answers:
        prompt = prompt_ids(tokenizer, messages[:n], template) if n else []
        if not prompt:
            raise TrainError(
                f"The row with the answer {messages[n].content!r} has an empty prompt."
            )
        upto = (
            whole
            if n == len(messages) - 1
            else answered_ids(tokenizer, messages[: n + 1], template)
        )
        if whole[: len(prompt)] != prompt or whole[: len(upto)] != upto:
            raise TrainError(_unlike(example, n == len(messages) - 1))
        spans.append((len(prompt), len(upto)))
    return Row(tuple(whole), tuple(spans))


def _cut(row: Row, max_length: int, example: Example) -> Row:
    spans = tuple((a, min(b, max_length)) for a, b in row.learned if a < max_length)
    if not spans:
        raise TrainError(
            f"The prompt of {_start(example)} alone fills the {max_length} tokens that a row may "
            f"have: nothing to learn is left; raise that (cutoff_len) or drop the row."
        )
    return Row(row.ids[:max_length], spans)


def preview(tokenizer: PreTrainedTokenizerBase, row: Row) -> list[tuple[str, bool]]:
    """The row's text in pieces, each with whether it is learned: the proof of the mask."""
    pieces = []
    start = 0
    for first, stop in row.learned:
        pieces += [(row.ids[start:first], False), (row.ids[first:stop], True)]
        start = stop
    pieces.append((row.ids[start:], False))
    return [(str(tokenizer.decode(list(ids))), learned) for ids, learned in pieces if ids]


def understood(tokenizer: PreTrainedTokenizerBase, template: Mapping[str, Any]) -> dict[str, Any]:
    """What of a training file's words to the template this one knows.

    Raises TrainError if thoughts are to be kept by a template that says nothing of that.
    """
    text = template_text(tokenizer)
    if template.get("preserve_thinking") and "preserve_thinking" not in text:
        raise TrainError(
            "preserve_thinking: the chat template of this base knows nothing of it, and decides "
            "itself what it keeps of earlier thoughts; drop it."
        )
    return {key: value for key, value in template.items() if key in text}


def unknown_to(tokenizer: PreTrainedTokenizerBase, template: Mapping[str, Any]) -> list[str]:
    """A line on each of a training file's words to the template that this one does not know."""
    rest = sorted(template.keys() - understood(tokenizer, template).keys())
    return [f"{key} is passed over: this base's chat template knows nothing of it." for key in rest]


def _unlike(example: Example, last: bool) -> str:
    if last:
        return (
            f"This chat template changes the prompt of {_start(example)} once it is answered, so "
            f"what is trained would not be what is served; use a template that only appends."
        )
    return (
        f"This chat template writes an earlier answer of {_start(example)} differently once the "
        f"conversation goes on; learn the last answers only (mask_history: true)."
    )


def _start(example: Example) -> str:
    text = next((m.content for m in example.messages if m.role == "user"), example.answer)
    return repr(text if len(text) <= 40 else text[:37] + "...")


def total_learned(rows: Sequence[Row]) -> int:
    """Tokens that are learned in all of these rows."""
    return sum(row.num_learned for row in rows)
