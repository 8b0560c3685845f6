"""Rows that a model writes: from our own server, and from one that misbehaves."""

from __future__ import annotations

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise

import pytest

from loramix.cli import main
from loramix.endpoint import ATTEMPTS, Endpoint
from loramix.engine import Chunk
from loramix.engine.fake import FakeEngine
from loramix.errors import BadRequest, TrainError
from loramix.generate import PATIENCE, diversity, generate
from loramix.library import Library
from loramix.lm import LM
from loramix.serve.service import Service
from loramix.train.dataset import load
from tests.serve.front import running
from tests.tiny import tiny_base

WORDS = ("red", "blue", "green", "black", "white", "pink", "grey", "gold", "brown", "teal", "plum")


def pair(n):
    first, second = WORDS[n % 11], WORDS[n // 11 % 11]
    return {"prompt": f"where {first} {second} {n}?", "completion": f"{n} is {first}"}


def listed(*numbers):
    return json.dumps([pair(n) for n in numbers])


def model(answers):
    """A writer that says these in turn, the last one for ever, and what it was asked."""
    asked = []

    def write(prompt, seed):
        asked.append((prompt, seed))
        return answers[min(len(asked), len(answers)) - 1]

    return write, asked


def rows_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_rows_are_written_told_apart_and_trained_on(tmp_path):
    lines = json.dumps(pair(3)) + "\n" + json.dumps(pair(4))
    said = [f"Sure!\n```json\n{listed(1, 2, 1)}\n```", lines]
    write, asked = model(said)
    journal = generate("colours", 4, write, tmp_path / "rows.jsonl", seed=5)
    assert rows_of(tmp_path / "rows.jsonl") == [pair(1), pair(2), pair(3), pair(4)]
    assert journal.dropped == {"said before": 1}
    assert [seed for _, seed in asked] == [5, 6]
    assert "colours" in asked[0][0]
    assert pair(1)["prompt"] in asked[1][0]
    assert len(load(tmp_path / "rows.jsonl").samples) == 4
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_run_that_was_cut_off_goes_on_to_the_same_rows(tmp_path):
    answers = [listed(n, n + 1) for n in range(0, 20, 2)]
    write, whole = model(answers)
    generate("colours", 12, write, tmp_path / "whole.jsonl")

    def cut(prompt, seed):
        if seed == 3:
            raise KeyboardInterrupt
        return answers[seed]

    with pytest.raises(KeyboardInterrupt):
        generate("colours", 12, cut, tmp_path / "cut.jsonl")
    part = tmp_path / "cut.jsonl.part"
    with part.open("a") as file:
        file.write('{"request": 3, "ro')
    with pytest.raises(TrainError, match="of the topic 'colours' and seed 0"):
        generate("sounds", 12, cut, tmp_path / "cut.jsonl")
    asked = []

    def rest(prompt, seed):
        asked.append((prompt, seed))
        return answers[seed]

    generate("colours", 12, rest, tmp_path / "cut.jsonl")
    assert asked == whole[3:]
    assert (tmp_path / "cut.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not part.exists()


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("I cannot help with that.", "no JSON"),
        ("", "no JSON"),
        ("[" * 5000, "no JSON"),
        ('[{"prompt": "x"}]', "no prompt and completion"),
        ('["a", 1, null]', "no prompt and completion"),
        ('{"prompt": "x y", "completion": 3}', "no prompt and completion"),
        ('{"prompt": "x y", "completion": "?!"}', "empty"),
        ('{"prompt": "x y", "completion": "X, y!"}', "an echo"),
        ('{"prompt": "x y", "completion": "z", "score": 1}', "other fields"),
        ('{"prompt": "the question", "completion": "the answer"}', "the example itself"),
        (json.dumps({"prompt": "x " * 2000, "completion": "y"}), "too long"),
    ],
)
def test_a_model_that_says_nothing_usable_is_refused(tmp_path, said, reason):
    write, asked = model([said])
    with pytest.raises(TrainError, match=rf"no new row in {PATIENCE} requests \({reason} "):
        generate("x", 3, write, tmp_path / "rows.jsonl")
    assert len(asked) == PATIENCE
    assert not (tmp_path / "rows.jsonl").exists()


def test_a_model_that_repeats_itself_is_refused_and_its_rows_stay(tmp_path):
    write, asked = model([listed(1, 2)])
    with pytest.raises(TrainError, match=r"2 of 3 rows are in .*rows.jsonl.part"):
        generate("x", 3, write, tmp_path / "rows.jsonl")
    assert len(asked) == 1 + PATIENCE


def test_what_cannot_be_meant_is_refused(tmp_path):
    write, asked = model([""])
    (tmp_path / "there.jsonl").touch()
    bad = [(" ", 3, "a.jsonl"), ("x", 0, "a.jsonl"), ("x", 3, "a.txt"), ("x", 3, "there.jsonl")]
    for topic, count, file in bad:
        with pytest.raises(BadRequest):
            generate(topic, count, write, tmp_path / file)
    (tmp_path / "b.jsonl.part").write_text("{}\n[]\n")
    with pytest.raises(TrainError, match="damaged"):
        generate("x", 3, write, tmp_path / "b.jsonl")
    assert not asked


def test_diversity_tells_rows_that_differ_from_rows_that_do_not():
    alike = [{"prompt": f"what is the colour of number {n}", "completion": "red"} for n in range(9)]
    pairs = pairwise(WORDS)
    apart = [{"prompt": f"{w} goes {v} by {w}{v}", "completion": "so"} for w, v in pairs]
    low, high = diversity(alike), diversity(apart)
    assert low.openings < high.openings == 1
    assert low.distinct_pairs < high.distinct_pairs
    assert low.nearest > high.nearest
    assert diversity(alike[:1]).nearest == 0


@contextmanager
def misbehaving(*replies):
    """A server that gives these in turn: a status and a text, or None to hang up; then the last."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            length = int(self.headers["content-length"])
            body = json.loads(self.rfile.read(length))
            asked.append((self.path, self.headers.get("authorization"), body))
            reply = replies[min(len(asked), len(replies)) - 1]
            if reply is None:
                return
            status, text = reply
            self.send_response(status)
            self.send_header("retry-after", "7")
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def chat(text):
    return 200, json.dumps({"choices": [{"message": {"content": text}}]})


def test_a_server_that_is_busy_broken_or_gone_is_asked_again(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    waits = []
    bad = [(429, "slow down"), (500, "oops"), None, (200, "<html>"), chat("")]
    replies = [*bad, chat(listed(1, 2, 3))]
    with misbehaving(*replies) as (url, asked):
        write = Endpoint(url, "some-model", sleep=waits.append)
        generate("colours", 3, write, tmp_path / "rows.jsonl")
    assert waits == [7, 7, 4]
    path, key, body = asked[0]
    assert (path, key) == ("/v1/chat/completions", "Bearer sesame")
    assert (body["model"], body["seed"]) == ("some-model", 0)
    assert [body["seed"] for _, _, body in asked] == [0, 0, 0, 0, 1, 2]


def test_a_server_that_never_answers_is_given_up(tmp_path):
    waits = []
    busy = pytest.raises(TrainError, match="503: busy; the same command goes on later")
    with misbehaving((503, "busy")) as (url, asked), busy:
        generate("x", 3, Endpoint(url, sleep=waits.append), tmp_path / "rows.jsonl")
    assert len(asked) == ATTEMPTS == len(waits) + 1
    refused = pytest.raises(TrainError, match="401: no key")
    with misbehaving((401, "no key")) as (url, asked), refused:
        generate("x", 3, Endpoint(url, sleep=waits.append), tmp_path / "other.jsonl")
    assert len(asked) == 1
    with pytest.raises(BadRequest, match="is no address"):
        Endpoint("localhost:8000")


def test_a_silent_server_is_not_waited_for_for_ever(tmp_path):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as deaf:
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}/v1"
        with pytest.raises(TrainError, match="does not answer"):
            Endpoint(url, timeout_s=0.05, sleep=lambda s: None)("x", 0)


class Canned(FakeEngine):
    """Writes two new rows for each seed."""

    async def stream(self, request):
        n = 2 * request.sampling.seed
        yield Chunk(listed(n, n + 1), 1, "stop", 1, index=0)


def test_the_command_asks_our_own_server(tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    words = ["data", "generate", str(file), "--topic", "colours", "--n", "5"]
    with LM(Canned(), Library(tmp_path / "library")) as lm, running(Service(lm)) as front:
        assert main([*words, "--endpoint", f"{front.url}/v1", "--model", "base"]) == 0
    assert rows_of(file) == [pair(n) for n in range(5)]
    said = capsys.readouterr().out
    assert "5 rows" in said
    assert "3 requests" in said
    assert main([*words, "--endpoint", "http://x/v1"]) == 1
    assert "must be a new file" in capsys.readouterr().err


def test_a_base_that_cannot_write_is_refused(tmp_path, capsys):
    base = tiny_base(max_position_embeddings=1024)
    base.model.save_pretrained(tmp_path / "base")
    base.tokenizer.save_pretrained(tmp_path / "base")
    words = ["data", "generate", str(tmp_path / "rows.jsonl"), "--topic", "x", "--n", "3"]
    assert main([*words, "--base", str(tmp_path / "base"), "--max-tokens", "8"]) == 1
    assert "gave no new row in 6 requests (no JSON 6" in capsys.readouterr().err
    for more in ([], ["--base", "x", "--endpoint", "http://x"], ["--base", "x", "--model", "y"]):
        assert main([*words, *more]) == 1
        assert "Give --endpoint" in capsys.readouterr().err
