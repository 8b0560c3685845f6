"""`loramix keys`: the secret is shown once, and opens what was said."""

import json
import os

import pytest

from loramix.cli import main
from loramix.store import Store


def test_a_key_is_made_listed_and_removed(capsys):
    words = ["--adapter", "sql", "--adapter", "math", "--requests-per-minute", "60"]
    assert main(["keys", "add", "ada", *words]) == 0
    secret, said = capsys.readouterr()
    assert "cannot be shown again" in said
    with Store.open(os.environ["LORAMIX_DATABASE"]) as store:
        key = store.keys.find(secret.strip())
    assert (key.name, key.role, key.adapters) == ("ada", "user", ("math", "sql"))
    assert main(["keys", "list", "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["requests_per_minute"] == 60
    assert secret.strip() not in line
    assert main(["keys", "list"]) == 0
    assert "math, sql" in capsys.readouterr().out
    assert main(["keys", "remove", "ada"]) == 0
    assert main(["keys", "remove", "ada"]) == 1
    assert "no key 'ada'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [["a b"], ["ada", "--role", "root"], ["ada", "--tokens-per-minute", "0"],
     ["ada", "--database", "mysql://x/y"]],
)  # fmt: skip
def test_keys_that_cannot_be_are_refused(words, capsys):
    assert main(["keys", "add", *words]) == 1
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("Error: ")
