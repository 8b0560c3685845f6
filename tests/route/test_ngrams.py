"""Hashed n-grams: the same on every machine, indifferent to case and punctuation, bounded."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from loramix.route.ngrams import MAX_CHARS, NgramEncoder, Sparse, Vocabulary, clip, words

NGRAMS = NgramEncoder()
GOLDEN = [11811, 15979, 50993, 64949, 76460, 98922, 102095, 103557, 118744, 122810]  # of "hi hi"


def test_columns_never_change() -> None:
    # golden: a router saved years ago must still find its weights
    columns, values = NGRAMS.terms("hi hi")
    assert columns.tolist() == GOLDEN
    assert values.min() == 1
    assert values.max() == np.float32(1 + np.log(2))


def test_hashing_does_not_depend_on_the_process() -> None:
    code = (
        "from loramix.route.ngrams import NgramEncoder; print(NgramEncoder().terms('a b')[0].sum())"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert runs == {f"{NGRAMS.terms('a b')[0].sum()}\n"}


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=300))
def test_any_text_gives_ascending_columns_in_range(text: str) -> None:
    columns, values = NGRAMS.terms(text)
    assert (np.diff(columns) > 0).all()
    assert columns.min() >= 0
    assert columns.max() < NGRAMS.size
    assert len(columns) == len(values)
    assert (values >= 1).all()


@settings(max_examples=50, deadline=None)
@given(st.text(alphabet="abc xyz", max_size=40))
def test_case_and_punctuation_do_not_matter(text: str) -> None:
    loud = "  " + text.upper().replace(" ", " , ") + "!?"
    assert words(loud) == words(text)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(alphabet="abcd ", max_size=20), max_size=6))
def test_sparse_rows_are_the_dense_ones(texts: list[str]) -> None:
    small = NgramEncoder(bits=8)
    counts = small.matrix(texts)
    weights = np.random.default_rng(0).normal(size=(small.size, 3)).astype(np.float32)
    dense = np.zeros((len(texts), small.size), np.float32)
    for row, text in zip(dense, texts, strict=True):
        columns, values = small.terms(text)
        row[columns] = values
    np.testing.assert_allclose(counts.dot(weights), dense @ weights, atol=1e-4)


def test_encode_has_unit_rows() -> None:
    lengths = np.linalg.norm(NGRAMS.encode(["one text", "another", ""]), axis=1)
    np.testing.assert_allclose(lengths, 1, atol=1e-6)


def test_empty_rows_dot_to_zero() -> None:
    rows = Sparse(np.array([0, 0, 1, 1]), np.array([1]), np.array([2.0], np.float32))
    assert rows.dot(np.ones((3, 2), np.float32)).tolist() == [[0, 0], [2, 2], [0, 0]]


@settings(max_examples=50, deadline=None)
@given(st.text(min_size=MAX_CHARS + 1, max_size=MAX_CHARS + 50))
def test_long_texts_keep_start_and_end(text: str) -> None:
    clipped = clip(text)
    assert len(clipped) == MAX_CHARS + 1
    assert clipped[:5] == text[:5]
    assert clipped[-5:] == text[-5:]


def test_unknown_words_shorten_a_row() -> None:
    vocabulary = Vocabulary.fit(NGRAMS.matrix(["red apple", "red pear", "red plum apple"]))
    known, mixed, new = (
        float((vocabulary.weigh(NGRAMS.matrix([text])).values ** 2).sum())
        for text in ("red apple", "red zebra", "zebra")
    )
    assert known > mixed > new


def test_rows_marked_rare_keep_every_column() -> None:
    counts = NGRAMS.matrix(["alpha", "zuzzu"])
    assert len(Vocabulary.fit(counts).columns) == 0
    kept = Vocabulary.fit(counts, rare=np.array([1])).columns
    assert set(kept) == set(NGRAMS.terms("zuzzu")[0])
