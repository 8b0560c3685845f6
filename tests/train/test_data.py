"""What is trained is what is served: the same prompt, and only the answers are learned."""

import pytest

from loramix.chat import Example, Message, prompt_ids
from loramix.errors import TrainError
from loramix.train.data import Row, preview, tokenise, understood, unknown_to
from tests.tiny import tiny_tokenizer

TURNS = Example(
    (
        Message("system", "be brief"),
        Message("user", "one"),
        Message("assistant", "two"),
        Message("user", "three"),
        Message("assistant", "four"),
    )
)


def said(tokenizer, row):
    return [text for text, learned in preview(tokenizer, row) if learned]


def test_a_row_is_the_served_prompt_then_the_answer_and_its_end():
    tokenizer = tiny_tokenizer()
    example = Example.of("the question", "an answer")
    row = tokenise(tokenizer, example, 64)
    ((start, stop),) = row.learned
    assert list(row.ids[:start]) == prompt_ids(tokenizer, example.messages[:-1])
    assert tokenizer.decode(row.ids[start:stop]) == "an answer</s>"


def test_every_answer_of_a_conversation_is_learned_and_nothing_else():
    tokenizer = tiny_tokenizer()
    row = tokenise(tokenizer, TURNS, 99)
    assert said(tokenizer, row) == ["two</s>", "four</s>"]
    assert "".join(text for text, _ in preview(tokenizer, row)) == tokenizer.decode(row.ids)
    last = tokenise(tokenizer, TURNS, 99, learned="last answer")
    assert said(tokenizer, last) == ["four</s>"]
    everything = tokenise(tokenizer, TURNS, 99, learned="all")
    assert everything.num_learned == len(everything.ids) - 1


def test_a_template_that_rewrites_earlier_answers_is_refused_unless_only_the_last_is_learned():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>"
        "{% if m.role != 'assistant' or loop.last %}{{ m.content }}{% endif %}</s>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    with pytest.raises(TrainError, match="mask_history"):
        tokenise(tokenizer, TURNS, 99)
    row = tokenise(tokenizer, TURNS, 99, learned="last answer")
    assert said(tokenizer, row) == ["four</s>"]


def test_plain_text_is_learned_whole():
    tokenizer = tiny_tokenizer()
    row = tokenise(tokenizer, Example((Message("assistant", "a plain text"),)), 64)
    assert tokenizer.decode(row.ids) == "a plain text</s>"
    assert row.num_learned == len(row.ids) - 1


def test_without_a_chat_template_the_answer_follows_the_text_and_ends():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    row = tokenise(tokenizer, Example.of("the question ", "an answer"), 64)
    assert tokenizer.decode(row.ids) == "the question an answer</s>"
    assert said(tokenizer, row) == ["an answer</s>"]


def test_truncation_cuts_the_end_and_keeps_something_to_learn():
    tokenizer = tiny_tokenizer()
    example = Example.of("q", "a" * 99)
    row = tokenise(tokenizer, example, 64, truncate=True)
    assert len(row.ids) == 64
    assert row.learned == ((4, 64),)
    with pytest.raises(TrainError, match="alone fills the 4 tokens that a row may have"):
        tokenise(tokenizer, example, 4, truncate=True)


@pytest.mark.parametrize(
    ("example", "template", "expected"),
    [
        (Example.of("q", "  "), None, "empty answer"),
        (Example.of("q", "a" * 99), None, r"may have; raise that \(cutoff_len\)"),
        (Example.of("q", "a"), "{{ messages | length }}", "changes the prompt"),
        (Example.of("", "a"), "{% for m in messages %}{{ m.content }}{% endfor %}", "empty prompt"),
        (TURNS, "{{ raise_exception('no system turns') }}", "no system turns"),
    ],
)
def test_a_row_that_would_teach_something_else_is_refused(example, template, expected):
    tokenizer = tiny_tokenizer()
    if template:
        tokenizer.chat_template = template
    with pytest.raises(TrainError, match=expected):
        tokenise(tokenizer, example, 64)


def test_a_row_counts_what_it_teaches():
    assert Row((1, 2, 3, 4, 5), ((1, 2), (3, 5))).num_learned == 3


def test_a_template_is_told_what_it_knows_of():
    tokenizer = tiny_tokenizer()
    told = {"enable_thinking": True, "preserve_thinking": False}
    assert understood(tokenizer, told) == {}
    assert [note.split()[0] for note in unknown_to(tokenizer, told)] == sorted(told)
    with pytest.raises(TrainError, match="preserve_thinking: the chat template of this base"):
        understood(tokenizer, {"preserve_thinking": True})
    tokenizer.chat_template += "{% if preserve_thinking %}{% endif %}"
    assert understood(tokenizer, {"preserve_thinking": True}) == {"preserve_thinking": True}
