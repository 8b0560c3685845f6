import json

import pytest

from loramix.adapter import Card
from loramix.errors import FormatError
from loramix.formats.card import read_card, write_card

FULL = Card(
    name="sql",
    description="Texts to SQL, «quoted»",
    skills=("sql", "tables"),
    examples=("how many singers?",),
    weight=0.75,
    base="pocket",
    base_fingerprint="0123456789abcdef",
    licence="Apache-2.0",
    scores={"exact": 0.95},
)


@pytest.mark.parametrize("card", [FULL, Card("sql")])
def test_a_card_survives_its_file(card, tmp_path):
    write_card(card, tmp_path)
    assert read_card(tmp_path) == card
    before = (tmp_path / "card.json").read_bytes()
    write_card(read_card(tmp_path), tmp_path)
    assert (tmp_path / "card.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["card.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "holds a JSON list"),
        ('{"name": "sql", "wieght": 1}', "unknown field wieght"),
        ('{"name": "sql", "weight": "1"}', "weight is '1'; expected a number"),
        ('{"name": "sql", "weight": NaN}', "expected a finite number"),
        ('{"name": "sql", "skills": [1]}', "expected a list of texts"),
        ('{"name": "sql", "scores": []}', "expected an object"),
        ('{"name": 3}', "name is 3; expected text"),
    ],
)
def test_a_card_that_cannot_be_right_is_refused(text, message, tmp_path):
    (tmp_path / "card.json").write_text(text, "utf-8")
    with pytest.raises(FormatError, match=message):
        read_card(tmp_path)


def test_a_card_without_a_name_or_a_file_is_refused(tmp_path):
    with pytest.raises(FormatError, match=r"card.json does not exist"):
        read_card(tmp_path)
    (tmp_path / "card.json").write_text(json.dumps({"name": "auto"}), "utf-8")
    with pytest.raises(FormatError, match=r"card.json: 'auto' cannot name an adapter"):
        read_card(tmp_path)
