"""Every dataset that cannot be learned from says exactly what is wrong with it."""

from __future__ import annotations

import gzip
import json

import pytest

from loramix.errors import TrainError
from loramix.train.dataset import accepted, load

GOOD = {"instruction": "a", "output": "b"}
LIMIT = "Mend them, or allow more (max_bad_rows)."


def lines(*rows):
    return "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows).encode()


def share(*turns, **more):
    return {"conversations": [{"from": who, "value": what} for who, what in turns], **more}


def one(what, line=2, rows=2):
    return f"1 of {rows} rows of FILE cannot be learned, more than 5%: line {line}: {what}. {LIMIT}"


HUMAN, GPT = ("human", "q"), ("gpt", "a")
FIRST = share(HUMAN, GPT)
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
USER, SAID = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}

BAD = {
    "empty.jsonl": (b"", "FILE is empty; expected at least one row."),
    "blank.jsonl": (b"\n\n \n", "FILE has no rows; expected at least one."),
    "none.json": (b"[]", "FILE has no rows; expected at least one."),
    "header.csv": (b"instruction,output\n", "FILE has no rows; expected at least one."),
    "rows.xlsx": (
        b"PK",
        "FILE is of no kind that can be read; expected json, jsonl, csv, tsv, parquet, txt.",
    ),
    "broken-line.jsonl": (
        lines(GOOD, '{"instruction": "a", '),
        one(
            "not JSON (Expecting property name enclosed in double quotes); "
            "expected one object a line"
        ),
    ),
    "not-json.jsonl": (
        lines(GOOD, "hello"),
        one("not JSON (Expecting value); expected one object a line"),
    ),
    "cut.json": (
        b'[{"instruction": "a",\n "output": "b"},\n {"instruction": "a", "ou',
        "FILE is broken at line 3: Unterminated string starting at; mend it, or save it as JSON "
        "lines, of which single ones may be broken.",
    ),
    "no-comma.json": (
        b'[{"instruction": "a", "output": "b"}\n {"instruction": "a"}]',
        "FILE is broken at line 2: Expecting ',' delimiter; mend it, or save it as JSON lines, of "
        "which single ones may be broken.",
    ),
    "object.json": (
        b'{"rows": []}',
        "FILE is not a list of rows; expected [{...}, ...] or lines of JSON.",
    ),
    "latin1.jsonl": (
        lines(GOOD) + b'\n{"instruction": "caf\xe9", "output": "b"}',
        one("not UTF-8 (byte 0xe9); convert it"),
    ),
    "latin1.csv": (
        b"instruction,output\ncaf\xe9,b\n",
        "FILE is not UTF-8 at line 2 (byte 0xe9); convert it.",
    ),
    "utf16.jsonl": (
        json.dumps(GOOD).encode("utf-16"),
        "FILE is UTF-16; save it as UTF-8.",
    ),
    "utf16.json": (json.dumps([GOOD]).encode("utf-16"), "FILE is UTF-16; save it as UTF-8."),
    "huge.jsonl": (
        lines(GOOD) + b'\n{"instruction": "' + b"a" * (200 * 2**20) + b'", "output": "b"}\n',
        one("longer than 16 MiB; split it, or drop it"),
    ),
    "torn.json.gz": (
        gzip.compress(lines(GOOD))[:-9],
        "FILE is not a whole gzip file (Compressed file ended before the end-of-stream marker was "
        "reached); fetch it again.",
    ),
    "plain.jsonl.gz": (
        lines(GOOD),
        "FILE is not a whole gzip file (Not a gzipped file (b'{\"')); fetch it again.",
    ),
    "other.parquet": (
        b"no parquet at all",
        "FILE is not a whole parquet file (Parquet magic bytes not found in footer. Either the "
        "file is corrupted or this is not a parquet file.).",
    ),
    "numbers.jsonl": (lines(GOOD, "3"), one("a int; expected an object with columns")),
    "lists.json": (
        b"[[1, 2]]",
        one("a list; expected an object with columns", line=1, rows=1),
    ),
    "strange.jsonl": (
        lines({"foo": 1, "bar": 2}),
        "The columns 'foo', 'bar' are of no known shape; expected alpaca (instruction, output), "
        "sharegpt (conversations), messages, prompt and completion, or text; rename them, or name "
        "them in dataset_info.json.",
    ),
    "mixed-columns.jsonl": (
        lines(GOOD, {"prompt": "a", "completion": "b"}),
        one("no column 'instruction'; it has 'prompt', 'completion'"),
    ),
    "mixed-shapes.jsonl": (
        lines(FIRST, GOOD),
        one("no column 'conversations'; it has 'instruction', 'output'"),
    ),
    "empty-answer.jsonl": (
        lines(GOOD, {"instruction": "a", "output": " "}),
        one("'output' is empty; there is nothing to learn"),
    ),
    "empty-question.jsonl": (
        lines(GOOD, {"instruction": "", "output": "b"}),
        one("'instruction' is empty; expected a question"),
    ),
    "null-answer.jsonl": (
        lines(GOOD, {"instruction": "a", "output": None}),
        one("'output' is a NoneType; expected text"),
    ),
    "number-answer.jsonl": (
        lines(GOOD, {"instruction": "a", "output": 7}),
        one("'output' is a int; expected text"),
    ),
    "history.jsonl": (
        lines(GOOD, {**GOOD, "history": [["only one"]]}),
        one("a history that is not a list of pairs of texts"),
    ),
    "empty-text.jsonl": (
        lines({"text": "a"}, {"text": ""}),
        one("'text' is empty; there is nothing to learn"),
    ),
    "two-users.jsonl": (
        lines(FIRST, share(HUMAN, HUMAN, GPT)),
        one("turn 2 is of the user; expected assistant"),
    ),
    "answer-first.jsonl": (
        lines(FIRST, share(GPT, HUMAN, GPT)),
        one("turn 1 is of the assistant; expected system or user"),
    ),
    "no-answer.jsonl": (
        lines(FIRST, share(HUMAN)),
        one("the last turn is of the user; expected an answer"),
    ),
    "late-system.jsonl": (
        lines(FIRST, share(HUMAN, ("system", "s"), GPT)),
        one("turn 2 is of the system; expected assistant"),
    ),
    "tool-without-call.jsonl": (
        lines(FIRST, share(HUMAN, ("observation", "3"), GPT)),
        one("turn 2 is of the tool; expected assistant"),
    ),
    "unknown-role.jsonl": (
        lines(FIRST, share(HUMAN, ("bot", "a"))),
        one("turn 2 is of 'bot'; expected human, gpt, observation, function_call, system"),
    ),
    "no-turns.jsonl": (
        lines(FIRST, {"conversations": []}),
        one("'conversations' is no list of turns, or an empty one"),
    ),
    "turn-without-role.jsonl": (
        lines(FIRST, {"conversations": [{"value": "q"}]}),
        one("turn 1 has no 'from'"),
    ),
    "empty-turn.jsonl": (
        lines(FIRST, share(HUMAN, ("gpt", ""))),
        one("turn 2, an answer, is empty; there is nothing to learn"),
    ),
    "call-no-json.jsonl": (
        lines(FIRST, share(HUMAN, ("function_call", "f(x)"), ("observation", "1"), GPT)),
        one("turn 2, a function call, is not JSON (Expecting value)"),
    ),
    "tools-no-json.jsonl": (
        lines(FIRST, share(HUMAN, GPT, tools="{")),
        one(
            "'tools' is not JSON (Expecting property name enclosed in double quotes)",
        ),
    ),
    "image.jsonl": (
        lines(
            {"messages": [USER, SAID]},
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, SAID]},
        ),
        one("turn 1 has a part of type 'image_url'; expected text"),
    ),
    "null-content.jsonl": (
        lines({"messages": [USER, SAID]}, {"messages": [{"role": "user", "content": None}, SAID]}),
        one("turn 1 has no 'content'"),
    ),
    "call-unanswered.jsonl": (
        lines({"messages": [USER, SAID]}, {"messages": [USER, CALL, USER, SAID]}),
        one("turn 3 is of the user; expected tool"),
    ),
    "wide.csv": (
        b"instruction,output\na,b\na,b,c\n",
        one("more fields than the 2 of the header", line=3),
    ),
    "narrow.csv": (
        b"instruction,output\na,b\na\n",
        one("fewer fields than the 2 of the header", line=3),
    ),
    "unquoted.csv": (
        b'instruction,output\na,"b\n',
        "FILE is broken at line 2: unexpected end of data; mend it.",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_dataset_says_what_is_wrong(name, tmp_path):
    content, expected = BAD[name]
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(TrainError) as error:
        accepted(load(file), str(file))
    assert str(error.value).replace(str(file), "FILE") == expected
    assert len(BAD) >= 30


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(TrainError, match="does not exist; expected a file of rows"):
        load(tmp_path / "rows.jsonl")


def test_a_few_bad_rows_are_left_out_and_listed(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(lines(*[GOOD] * 30, "broken", *[GOOD] * 30))
    loaded = load(file)
    assert len(accepted(loaded, "rows")) == 60
    assert [problem.line for problem in loaded.problems] == [31]
    with pytest.raises(TrainError, match="more than 1%: line 31"):
        accepted(loaded, "rows", max_bad=0.01)


def test_many_bad_rows_are_listed_by_the_first_of_them(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(lines(GOOD, *["broken"] * 9))
    with pytest.raises(TrainError, match=r"9 of 10 rows .* line 6: .*; and 4 more\."):
        accepted(load(file), "rows")
