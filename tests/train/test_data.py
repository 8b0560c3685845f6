"""What is trained is what is served: the same prompt, and only the answer is learned."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramix.chat import Example, prompt_ids
from loramix.errors import TrainError
from loramix.train.data import IGNORED, Row, batches, collate, tokenise
from tests.tiny import tiny_tokenizer

ROWS = st.lists(
    st.tuples(st.integers(1, 9), st.integers(1, 9)).map(
        lambda size: Row(tuple(range(1, 1 + sum(size))), size[0])
    ),
    min_size=1,
    max_size=70,
)


def test_a_row_is_the_served_prompt_then_the_answer_and_its_end():
    tokenizer = tiny_tokenizer()
    example = Example.of("the question", "an answer")
    row = tokenise(tokenizer, example, 64)
    assert list(row.ids[: row.answer_at]) == prompt_ids(tokenizer, example.messages[:-1])
    assert tokenizer.decode(row.ids[row.answer_at :]) == "an answer</s>"


def test_without_a_chat_template_the_answer_follows_the_text_and_ends():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    row = tokenise(tokenizer, Example.of("the question ", "an answer"), 64)
    assert tokenizer.decode(row.ids) == "the question an answer</s>"


@pytest.mark.parametrize(
    ("example", "template", "expected"),
    [
        (Example.of("q", "  "), None, "empty answer"),
        (Example.of("q", "a" * 99), None, "max_length"),
        (Example.of("q", "a"), "{{ messages | length }}", "changes the prompt"),
        (Example.of("", "a"), "{% for m in messages %}{{ m.content }}{% endfor %}", "empty prompt"),
    ],
)
def test_a_row_that_would_teach_something_else_is_refused(example, template, expected):
    tokenizer = tiny_tokenizer()
    if template:
        tokenizer.chat_template = template
    with pytest.raises(TrainError, match=expected):
        tokenise(tokenizer, example, 64)


def test_rows_end_together_and_only_answers_are_labelled():
    batch = collate([Row((5, 6, 7, 8), 2), Row((9, 10), 1)])
    assert batch.ids.tolist() == [[5, 6, 7, 8], [0, 0, 9, 10]]
    assert batch.mask.tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    assert batch.positions.tolist() == [[0, 1, 2, 3], [0, 0, 0, 1]]
    assert batch.labels.tolist() == [[7, 8], [IGNORED, 10]]


@given(ROWS, st.integers(1, 8), st.integers(0, 99))
def test_an_epoch_has_every_row_once(rows, size, seed):
    found = []
    for batch in batches(rows, size, random.Random(seed)):
        assert len(batch.ids) <= size
        found += batch.mask.sum(1).tolist()
    assert sorted(found) == sorted(len(row.ids) for row in rows)


def test_the_same_seed_gives_the_same_order():
    rows = [Row(tuple(range(2, 4 + n % 5)), 1) for n in range(40)]
    first, second = (
        [batch.ids.tolist() for batch in batches(rows, 4, random.Random(7))] for _ in range(2)
    )
    assert first == second
