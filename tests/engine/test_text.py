"""Text comes in whole characters and stops before its stop strings, however it is cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramix.engine.text import BROKEN, Detokenizer, StopStrings
from tests.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def pieces(tokens, prompt=()):
    detokenizer = Detokenizer(TOKENIZER, prompt)
    return [*(detokenizer.push(token) for token in tokens), detokenizer.flush()]


@given(st.text(max_size=30))
def test_characters_arrive_whole_and_complete(text):
    parts = pieces(TOKENIZER(text)["input_ids"])
    assert "".join(parts) == text
    assert BROKEN in text or not any(BROKEN in part for part in parts)


@given(st.text(max_size=10), st.text(max_size=10))
def test_an_answer_reads_on_from_its_prompt(prompt, text):
    parts = pieces(TOKENIZER(text)["input_ids"], TOKENIZER(prompt)["input_ids"])
    assert "".join(parts) == text


def test_characters_of_four_bytes_wait_for_the_fourth():
    tokens = TOKENIZER("a🙂b")["input_ids"]
    assert pieces(tokens) == ["a", "", "", "", "🙂", "b", ""]


def test_broken_bytes_do_not_wait_for_ever_nor_break_what_follows():
    (stray,) = TOKENIZER.convert_tokens_to_ids(["Ģ"])  # a byte that begins no character
    tokens = [stray] * 9 + TOKENIZER("€!")["input_ids"]
    parts = pieces(tokens)
    assert "".join(parts) == BROKEN * 9 + "€!"
    assert sum(map(len, parts[:9])) >= 6


def test_special_tokens_have_no_text():
    assert "".join(pieces([77, 2, 3, 78])) == TOKENIZER.decode([77, 78])


def test_a_cut_character_is_shown_at_the_end():
    assert "".join(pieces(TOKENIZER("€")["input_ids"][:2])) == BROKEN


letters = st.text("ab", max_size=20)


@given(letters, st.lists(st.text("ab", min_size=1, max_size=5), max_size=3), st.data())
def test_text_ends_before_the_stop_string_completed_first_however_it_is_cut(text, stops, data):
    found = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    wanted = text[: min(found)[1]] if found else text
    stream, shown, at = StopStrings(stops), "", 0
    while at < len(text):
        size = data.draw(st.integers(1, 3))
        shown += stream.push(text[at : at + size])
        assert wanted.startswith(shown)
        at += size
    assert shown + stream.flush() == wanted
    assert stream.found == bool(found)


@pytest.mark.parametrize(
    ("text", "shown"),
    [("so", "s"), ("so t", "s"), ("so to", "s"), ("so tx", "so tx"), ("st", "st")],
)
def test_only_what_may_be_a_stop_string_is_held_back(text, shown):
    assert StopStrings(["o tok"]).push(text) == shown
