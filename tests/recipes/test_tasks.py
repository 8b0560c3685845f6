"""The tasks of pocket: equations as a reader writes them; nothing held out is learned."""

import random

import pytest

from loramix.chat import Example
from recipes.pocket.corpus import require_unseen
from recipes.pocket.judge import Score
from recipes.pocket.tasks import TASKS, infix, load, renumbered, shape


@pytest.mark.parametrize(
    ("prefix", "expected"),
    [
        ("+ 4 5", "4 + 5"),
        ("/ - 9 1 2", "( 9 - 1 ) / 2"),
        ("- 9 + 1 2", "9 - ( 1 + 2 )"),
        ("* + 1 2 - 8 3", "( 1 + 2 ) * ( 8 - 3 )"),
    ],
)
def test_polish_notation_becomes_an_equation(prefix, expected):
    assert infix(prefix.split()) == expected


@pytest.mark.parametrize("seed", range(20))
def test_renumbering_changes_question_and_equation_alike(seed):
    example = Example.of("Tom had 12 apples , ate 5 and 12 rotted .", "( 12 - 5 ) - 12", "math")
    changed = renumbered(example, random.Random(seed))
    numbers = [t for t in changed.answer.split() if t.isdigit()]
    large, small, again = numbers
    assert large == again
    assert int(large) > int(small)
    assert changed.query == f"Tom had {large} apples , ate {small} and {large} rotted ."


def test_a_number_the_question_does_not_spell_stays():
    example = Example.of("a dozen eggs and 3 more", "12 + 3", "math")
    assert renumbered(example, random.Random(0)) == example


def test_the_interval_is_wilsons():
    low, high = Score(81, 100).interval
    assert (round(low, 1), round(high, 1)) == (72.2, 87.5)


@pytest.mark.parametrize("name", TASKS)
def test_nothing_held_out_is_learned(name, data_dir):
    task = load(name, data_dir)
    learned = {" ".join(e.query.lower().split()) for e in task.train}
    assert len(task.heldout) >= 300
    assert not any(" ".join(e.query.lower().split()) in learned for e in task.heldout)
    if name == "math":
        alike = {shape(e.query) for e in task.train}
        assert not any(shape(e.query) in alike for e in task.heldout)


def test_a_corpus_with_a_held_out_row_is_refused():
    docs = ["A book.\nIts second line.", "what is your refund policy"]
    require_unseen(docs, ["What is", "is its second line?", "refund policy"])
    with pytest.raises(AssertionError, match=r"1 held-out queries .*'Its SECOND line!'"):
        require_unseen(docs, ["my card", "Its SECOND line!"])
