"""The server under load: streaming clients, each with a mix of its own.

    python benchmarks/server.py [--quick] [--json FILE] [--clients 64] [--seconds 180]

Servers in processes of their own; the clients are bare sockets in this one. On pocket every answer
is compared with the engine's own answer to the same request, computed here beforehand (greedy,
float32); one that differs counts unless the two likeliest tokens were within 1e-4 nats where it
first does. Each client asks its four questions in turns, so most prompts are in the cache. Then
eight clients of a random model of Qwen3-0.6B's shape: there the model sets the pace.

The CPU is that of the thread that serves HTTP, read from /proc (Linux): no matrix product is in it,
and neither is turning tokens into text, which the engine's thread does, nor the look whether there
are keys, once a request in a third. Memory is looked at after a minute of the same load, when the
allocator has settled.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import cycle
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import loramix
from loramix.chat import Message
from loramix.engine import Answer, Engine, Request, Sampling
from loramix.engine.local import LocalEngine
from loramix.library import Library
from loramix.lm import LM
from loramix.mix import Mix
from loramix.serve.app import server
from loramix.serve.service import Service
from loramix.store import Store

TOKENS = 48  # an answer's, at most
PROMPTS = 4  # of each client, in turns
CLOSE = 1e-4  # nats between two tokens that rounding may exchange
WARM_S = 60  # until the allocator has settled
FLAT_MIB = 32
SHAPE_CLIENTS, SHAPE_S = 8, 60
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass
class Seen:
    """What the clients saw."""

    first_s: list[float] = field(default_factory=list)
    num_events: int = 0
    num_tokens: int = 0
    num_answers: int = 0
    errors: list[str] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Question:
    mix: str
    text: str
    answer: Answer | None = None  # offline, to compare with
    ends: tuple[int, ...] = ()  # characters of it up to the end of each token

    @property
    def body(self) -> bytes:
        asked = {
            "model": self.mix,
            "messages": [{"role": "user", "content": self.text}],
            "temperature": 0,
            "max_tokens": TOKENS,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return json.dumps(asked).encode()


def questions(lm: LM, clients: int) -> list[list[Question]]:
    """Some for each client, all under a mix that nobody else has."""
    rows = [
        json.loads(line) for line in (Path(loramix.__file__).parent / "pocket/queries.jsonl").open()
    ]
    texts = [str(row.get("query") or row.get("text")) for row in rows]
    drawn = random.Random(0)
    mixes = [Mix({"banking": (i + 1) / clients, "sql": 1 - i / clients}) for i in range(clients)]
    asked = [(mix, drawn.choice(texts)) for mix in mixes for _ in range(PROMPTS)]
    sampling = Sampling(temperature=0, max_tokens=TOKENS, logprobs=2)
    requests = [Request((Message("user", text),), mix, sampling) for mix, text in asked]
    answers = lm.engine.generate(requests)
    made = [
        Question(str(mix), text, answer, _ends(lm.engine, answer))
        for (mix, text), answer in zip(asked, answers, strict=True)
    ]
    return [made[i * PROMPTS : (i + 1) * PROMPTS] for i in range(clients)]


def _ends(engine: Engine, answer: Answer) -> tuple[int, ...]:
    return tuple(len(engine.text(answer.tokens[:end])) for end in range(1, len(answer.tokens) + 1))


@dataclass(frozen=True)
class Figure:
    work: str
    name: str
    value: float
    unit: str
    target: float | None = None
    better: str = "lower"

    def __str__(self) -> str:
        aim = "" if self.target is None else f"   (target {self.target:g})"
        return f"{self.work}: {self.name:44} {self.value:10.1f} {self.unit}{aim}"

    @property
    def row(self) -> dict[str, object]:
        return {
            "work": f"{self.work}: {self.name}", "figure": self.value, "unit": self.unit,
            "peer": None, "target": self.target, "better": self.better,
        }  # fmt: skip


async def client(port: int, mine: Iterable[Question], end: float, seen: Seen) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    try:
        for question in mine:
            if time.monotonic() > end:
                break
            await ask(reader, writer, question, seen)
    except (ConnectionError, EOFError) as error:
        seen.errors.append(f"the connection ended: {error!r}")
    finally:
        writer.close()


async def ask(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, question: Question, seen: Seen
) -> None:
    body = question.body
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    start = time.monotonic()
    writer.write(head.encode() + body)
    status = (await line_of(reader)).split()[1].decode()
    length = 0
    while (line := await line_of(reader)).strip():
        name, _, value = line.partition(b":")
        length = int(value) if name.lower() == b"content-length" else length
    if status != "200":
        seen.errors.append(f"{status}: {(await reader.readexactly(length)).decode()}")
        return
    text, first = "", 0.0
    while not (line := await line_of(reader)).startswith(b"data: [DONE]"):
        if not line.startswith(b"data: "):
            continue  # sizes of chunks, empty lines
        event = json.loads(line[6:])
        seen.num_events += 1
        first = first or time.monotonic() - start
        if "error" in event:
            seen.errors.append(str(event["error"]))
        for choice in event.get("choices", ()):
            text += choice["delta"].get("content", "")
        seen.num_tokens += (event.get("usage") or {}).get("completion_tokens", 0)
    while (await line_of(reader)).strip() != b"0":  # the last chunk of the body
        pass
    await line_of(reader)
    seen.num_answers += 1
    seen.first_s.append(first)
    wanted = question.answer
    if wanted and text != wanted.text and not is_close(wanted, question.ends, text):
        seen.differing.append(f"{question.mix}: {text!r}, not {wanted.text!r}")


async def line_of(reader: asyncio.StreamReader) -> bytes:
    if line := await reader.readline():
        return line
    raise EOFError("in the middle of a response")


def is_close(answer: Answer, ends: Sequence[int], text: str) -> bool:
    """Whether the token in which the texts part was a matter of rounding.

    Or the one before it: of two tokens one may begin with the other's text.
    """
    pairs = enumerate(zip(answer.text, text, strict=False))
    parting = next((i for i, (a, b) in pairs if a != b), min(len(answer.text), len(text)))
    token = bisect_right(ends, parting)
    gaps = [own.top[0][1] - own.top[1][1] for own in answer.logprobs[max(0, token - 1) : token + 1]]
    return min(gaps, default=1.0) < CLOSE


def cpu_s(pid: int, thread: int) -> float:
    fields = Path(f"/proc/{pid}/task/{thread}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def rss_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


async def load(port: int, asked: Sequence[Iterable[Question]], seconds: float) -> Seen:
    seen = Seen()
    end = time.monotonic() + seconds
    await asyncio.gather(*(client(port, mine, end, seen) for mine in asked))
    return seen


def quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def serve_pocket(port: int) -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        Store.open(f"sqlite:///{folder}/loramix.db") as store,
        loramix.open("pocket") as lm,
    ):
        server(Service(lm, store), port=port).run()


def serve_shape(port: int) -> None:
    """Random weights of Qwen3-0.6B's shape; every token is a word, so each is an event."""
    from material import base_of, random_adapter, random_model

    model = random_model()
    base = replace(base_of(model), tokenizer=_wordy(model.config.vocab_size))
    with tempfile.TemporaryDirectory() as folder:
        library = Library(folder)
        for seed, name in enumerate(("a", "b")):
            library.put(random_adapter(model, name, seed))
        with LM(LocalEngine(base, library=library, kv_bytes=1 << 29), library) as lm:
            server(Service(lm), port=port).run()


def _wordy(size: int) -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(f"w{i}" for i in range(len(letters), size))]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


SERVERS: dict[str, Callable[[int], None]] = {"pocket": serve_pocket, "shape": serve_shape}


@contextmanager
def started(what: str) -> Iterator[tuple[int, int]]:
    """A server in a process of its own: its process id and its port."""
    port = free_port()
    process = subprocess.Popen([sys.executable, __file__, "--serve", what, "--port", str(port)])
    try:
        for _ in range(1200):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=1).read()
                break
            time.sleep(0.1)
        else:
            raise SystemExit("The server did not start.")
        yield process.pid, port
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def measured(
    pid: int, port: int, asked: Sequence[Sequence[Question]], warm_s: float, seconds: float
) -> tuple[Seen, float, float, float]:
    """What the clients saw, how long it took, the CPU s of HTTP meanwhile, the MiB it grew by."""
    asyncio.run(load(port, asked, 600.0))  # every question once: caches are as full as they get
    asyncio.run(load(port, [cycle(mine) for mine in asked], warm_s))
    memory, cpu, begun = rss_mib(pid), cpu_s(pid, pid), time.monotonic()
    seen = asyncio.run(load(port, [cycle(mine) for mine in asked], seconds))
    wall = time.monotonic() - begun
    return seen, wall, cpu_s(pid, pid) - cpu, rss_mib(pid) - memory


def on_pocket(clients: int, warm_s: float, seconds: float) -> list[Figure]:
    with loramix.open("pocket") as lm:
        asked = questions(lm, clients)
    with started("pocket") as (pid, port):
        seen, wall, cpu, grown = measured(pid, port, asked, warm_s, seconds)
    for line in [*seen.errors, *seen.differing][:5]:
        print("  ", line)
    if not seen.num_answers:
        raise SystemExit("No answer came.")
    work = f"{clients} streams"
    return [
        Figure(work, "answers", seen.num_answers, "", better="higher"),
        Figure(work, "errors", len(seen.errors), "", 0),
        Figure(work, "answers that differ from the engine's own", len(seen.differing), "", 0),
        Figure(work, "time to first token, p50", 1000 * quantile(seen.first_s, 0.5), "ms"),
        Figure(work, "time to first token, p99", 1000 * quantile(seen.first_s, 0.99), "ms"),
        Figure(work, "tokens", seen.num_tokens / wall, "1/s", better="higher"),
        Figure(work, "events", seen.num_events / wall, "1/s", better="higher"),
        Figure(work, "CPU of HTTP per event", 1e6 * cpu / max(1, seen.num_events), "us", 150),
        Figure(work, "memory grown after the warm-up", grown, "MiB", FLAT_MIB),
    ]


def at_shape(warm_s: float, seconds: float) -> list[Figure]:
    mixes = [Mix({"a": (i + 1) / 8, "b": 1 - i / 8}) for i in range(SHAPE_CLIENTS)]
    asked = [[Question(str(mix), f"Question {i}, please.")] for i, mix in enumerate(mixes)]
    with started("shape") as (pid, port):
        seen, wall, cpu, _ = measured(pid, port, asked, warm_s, seconds)
    for line in seen.errors[:5]:
        print("  ", line)
    work = f"{SHAPE_CLIENTS} streams at the 0.6B shape"
    return [
        Figure(work, "errors", len(seen.errors), "", 0),
        Figure(work, "events", seen.num_events / wall, "1/s", better="higher"),
        Figure(work, "CPU of HTTP, of the time", 100 * cpu / wall, "%", 3),
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--quick", action="store_true", help="a ninth of the time, after the same warm-up"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=180.0)
    parser.add_argument("--only", choices=SERVERS)
    parser.add_argument("--serve", choices=SERVERS, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        SERVERS[options.serve](options.port)
        return
    share = 1 / 9 if options.quick else 1
    figures: list[Figure] = []
    if options.only != "shape":
        figures += on_pocket(options.clients, WARM_S, options.seconds * share)
    if options.only != "pocket":
        figures += at_shape(0, SHAPE_S * share)
    for figure in figures:
        print(figure)
    if options.json:
        rows = [figure.row for figure in figures]
        options.json.write_text(json.dumps({"rows": rows}, indent=1))


if __name__ == "__main__":
    main()
