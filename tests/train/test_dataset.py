"""Rows in every shape people have them become the same conversations."""

from __future__ import annotations

import csv
import gzip
import json

import pytest

from loramix.chat import Call, Message
from loramix.errors import TrainError
from loramix.train.dataset import load, load_named, split, to_rows
from loramix.train.shapes import OPENAI_TAGS, TAGS, declared
from tests.tiny import tiny_tokenizer

ASKED = (Message("user", "two and two"), Message("assistant", "four"))
SHAPES = {
    "alpaca": {"instruction": "two", "input": "and two", "output": "four"},
    "sharegpt": {
        "conversations": [
            {"from": "human", "value": "two\nand two"},
            {"from": "gpt", "value": "four"},
        ]
    },
    "messages": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "two\nand two"}]},
            {"role": "assistant", "content": "four"},
        ]
    },
    "pairs": {"prompt": "two\nand two", "completion": "four"},
    "questions": {"question": "two\nand two", "answer": "four"},
}
EXPECTED = (Message("user", "two\nand two"), Message("assistant", "four"))


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_the_same_conversation(shape, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(SHAPES[shape]))
    (tmp_path / "rows.json").write_text(json.dumps([SHAPES[shape]], indent=2))
    (tmp_path / "rows.json.gz").write_bytes(gzip.compress(json.dumps([SHAPES[shape]]).encode()))
    for file in tmp_path.iterdir():
        (sample,) = load(file).samples
        assert sample.example.messages == EXPECTED


def test_tables_and_text(tmp_path):
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "response"])
        writer.writeheader()
        writer.writerow({"prompt": "two\nand two", "response": "four"})
    (sample,) = load(tmp_path / "rows.csv").samples
    assert sample.example.messages == EXPECTED
    (tmp_path / "rows.txt").write_text("one line\n\nanother\n", encoding="utf-8")
    loaded = load(tmp_path / "rows.txt").samples
    assert [(s.line, s.example.messages) for s in loaded] == [
        (1, (Message("assistant", "one line"),)),
        (3, (Message("assistant", "another"),)),
    ]


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist([SHAPES["sharegpt"]] * 3), tmp_path / "a.parquet")
    loaded = load(tmp_path / "a.parquet").samples
    assert [s.line for s in loaded] == [1, 2, 3]
    assert loaded[0].example.messages == EXPECTED


def test_a_byte_order_mark_and_lines_called_json_are_read(tmp_path):
    text = "\n".join([json.dumps(SHAPES["pairs"])] * 2)
    (tmp_path / "rows.json").write_text(text, encoding="utf-8-sig")
    assert [s.line for s in load(tmp_path / "rows.json").samples] == [1, 2]


def test_system_history_tools_and_calls(tmp_path):
    tool = {"name": "add", "parameters": {}}
    row = {
        "system": "be brief",
        "tools": json.dumps([tool]),
        "conversations": [
            {"from": "human", "value": "2+2"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2}}'},
            {"from": "observation", "value": "4"},
            {"from": "gpt", "value": "four"},
        ],
    }
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    (sample,) = load(tmp_path / "rows.jsonl").samples
    assert sample.example.messages == (
        Message("system", "be brief"),
        Message("user", "2+2"),
        Message("assistant", "", (Call("add", '{"a": 2}'),)),
        Message("tool", "4"),
        Message("assistant", "four"),
    )
    assert sample.tools == [{"type": "function", "function": tool}]
    rows, problems = to_rows(tiny_tokenizer(), [sample], 99)
    assert not rows
    assert "knows nothing of 'tools'" in problems[0].what


def test_history_comes_before_the_question(tmp_path):
    row = {"instruction": "c", "output": "d", "history": [["a", "b"]]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    (sample,) = load(tmp_path / "rows.jsonl").samples
    assert [m.content for m in sample.example.messages] == ["a", "b", "c", "d"]


def registry(folder, **entries):
    (folder / "dataset_info.json").write_text(json.dumps(entries))
    return folder


def test_a_registry_names_columns_and_tags(tmp_path):
    rows = [{"q": "two\nand two", "a": "four", "system": "unread"}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    folder = registry(
        tmp_path, own={"file_name": "rows.json", "columns": {"prompt": "q", "response": "a"}}
    )
    (sample,) = load_named(["own"], folder).samples
    assert sample.example.messages == EXPECTED


def test_named_columns_switch_the_others_off_as_in_llama_factory_and_it_is_said():
    notes = []
    entry = {"formatting": "sharegpt", "tags": {"user_tag": "user", "assistant_tag": "bot"}}
    shape = declared(entry, "x", notes)
    assert "observation_tag" not in shape.tags
    assert notes == ["x: turns of function_tag, observation_tag are not read (unnamed)."]
    assert declared({"formatting": "sharegpt"}, "x", notes).tags == TAGS
    assert declared({"formatting": "openai"}, "x", notes).tags == OPENAI_TAGS


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"file_name": "a.json", "columns": {"images": "images"}}, "a column for images"),
        ({"file_name": "a.json", "ranking": True}, "a column for chosen"),
        ({"file_name": "a.json", "columns": {"kto_tag": "label"}}, "kto_tag"),
        ({"file_name": "a.json", "formatting": "chatml"}, "formatting 'chatml'"),
        ({"file_name": "a.json", "columns": {"prompt": "a", "query": "b"}}, "prompt and response"),
        ({"ms_hub_url": "somebody/data"}, "neither hf_hub_url nor file_name; download it"),
        ({"hf_hub_url": "somebody"}, "is no hub id"),
        ({"hf_hub_url": ["a/b"]}, "hf_hub_url of the dataset .* expected text"),
        ({"file_name": "a.json"}, "a.json does not exist"),
        ({"file_name": 3}, "file_name of the dataset .* is 3; expected text"),
    ],
)
def test_an_entry_that_cannot_be_learned_is_refused(entry, expected, tmp_path):
    with pytest.raises(TrainError, match=expected):
        load_named(["own"], registry(tmp_path, own=entry))


def test_an_unknown_dataset_and_a_missing_registry(tmp_path):
    with pytest.raises(TrainError, match=r"dataset_info.json does not exist"):
        load_named(["own"], tmp_path)
    with pytest.raises(TrainError, match=r"No dataset 'onw' .* did you mean 'own'"):
        load_named(["onw"], registry(tmp_path, own={}))
    (tmp_path / "dataset_info.json").write_text("{")
    with pytest.raises(TrainError, match="is not JSON"):
        load_named(["own"], tmp_path)


def test_llama_factorys_own_demo_data(data_dir):
    folder = data_dir / "llamafactory_demo"
    names = ["identity", "alpaca_en_demo", "glaive_toolcall_en_demo"]
    counts = {}
    for name in names:
        loaded = load_named([name], folder)
        counts[name] = (len(loaded.samples), len(loaded.problems))
    assert counts == {
        "identity": (91, 0),
        "alpaca_en_demo": (999, 0),
        "glaive_toolcall_en_demo": (300, 0),
    }
    assert len(load(folder / "v1_sft_demo.jsonl.gz").samples) > 100
    with pytest.raises(TrainError, match="chosen"):
        load_named(["dpo_en_demo"], folder)


def test_a_split_is_the_same_whatever_the_order_and_keeps_equal_rows_together(tmp_path):
    rows = [{"prompt": f"q{n % 40}", "completion": "a"} for n in range(80)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    samples = list(load(tmp_path / "rows.jsonl").samples)
    learned, validation = split(samples, 0.2)
    queries = ({s.example.query for s in part} for part in (learned, validation))
    first, second = queries
    assert not first & second
    assert len(validation) in (16, 17)
    again = split(samples[::-1], 0.2)[1]
    assert {s.example.query for s in again} == second
    assert split(samples, 0)[1] == []
    with pytest.raises(TrainError, match="leave none to learn"):
        split(samples, 80)
