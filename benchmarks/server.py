"""The server under load: streaming clients, each with a mix of its own, on pocket.

    python benchmarks/server.py [--quick] [--json FILE] [--clients 64] [--seconds 180]

A server in a process of its own; the clients are bare sockets in this one. Every answer is compared
with the engine's own answer to the same request, computed here beforehand (greedy, float32); one
that differs counts unless the two likeliest tokens were within 1e-4 nats where it first does. The
CPU of the thread that serves HTTP is read from /proc (Linux), so it holds no matrix product.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path

import loramix
from loramix.chat import Message
from loramix.engine import Answer, Request, Sampling
from loramix.lm import LM
from loramix.mix import Mix

SERVE = """
import sys
import loramix
from loramix.serve.app import server
from loramix.serve.service import Service
with loramix.open("pocket") as lm:
    server(Service(lm), port=int(sys.argv[1])).run()
"""
TOKENS = 48  # an answer's, at most
PROMPTS = 4  # of each client, in turns
CLOSE = 1e-4  # nats between two tokens that rounding may exchange
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
    answer: Answer  # offline

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
        Question(str(mix), text, answer) for (mix, text), answer in zip(asked, answers, strict=True)
    ]
    return [made[i * PROMPTS : (i + 1) * PROMPTS] for i in range(clients)]


async def client(port: int, mine: Iterable[Question], end: float, seen: Seen) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    for question in mine:
        if time.monotonic() > end:
            break
        await ask(reader, writer, question, seen)
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
    status = (await reader.readline()).split()[1].decode()
    length = 0
    while (line := await reader.readline()).strip():
        name, _, value = line.partition(b":")
        length = int(value) if name.lower() == b"content-length" else length
    if status != "200":
        seen.errors.append(f"{status}: {(await reader.readexactly(length)).decode()}")
        return
    text, first = "", 0.0
    while not (line := await reader.readline()).startswith(b"data: [DONE]"):
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
    while (await reader.readline()).strip() != b"0":  # the last chunk of the body
        pass
    await reader.readline()
    seen.num_answers += 1
    seen.first_s.append(first)
    if text != question.answer.text and not is_close(question.answer, text):
        seen.differing.append(f"{question.mix}: {text!r}, not {question.answer.text!r}")


def is_close(answer: Answer, text: str) -> bool:
    """Whether some token up to where the texts part was a matter of rounding."""
    shared = next((i for i, (a, b) in enumerate(zip(answer.text, text)) if a != b), len(text))
    per_token = max(1, len(answer.text)) / max(1, len(answer.tokens))
    upto = int(shared / per_token) + 3
    gaps = [own.top[0][1] - own.top[1][1] for own in answer.logprobs[:upto]]
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


def started(port: int) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-c", SERVE, str(port)])
    for _ in range(600):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=1).read()
            return process
        except OSError:
            time.sleep(0.1)
    raise SystemExit("The server did not start.")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=180.0)
    options = parser.parse_args()
    seconds = 20.0 if options.quick else options.seconds
    with loramix.open("pocket") as lm:
        asked = questions(lm, options.clients)
    port = free_port()
    process = started(port)
    try:
        asyncio.run(load(port, asked, 600.0))  # every question once: caches are as full as they get
        memory, cpu, begun = rss_mib(process.pid), cpu_s(process.pid, process.pid), time.monotonic()
        seen = asyncio.run(load(port, [cycle(mine) for mine in asked], seconds))
        wall = time.monotonic() - begun
        cpu = cpu_s(process.pid, process.pid) - cpu
        grown = rss_mib(process.pid) - memory
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)
    report(seen, wall, cpu, grown, options.clients, options.json)


def report(
    seen: Seen, wall: float, cpu: float, grown: float, clients: int, file: Path | None
) -> None:
    figures = [
        ("answers", seen.num_answers, "", None, "higher"),
        ("errors", len(seen.errors), "", 0, "lower"),
        ("answers that differ from the engine's own", len(seen.differing), "", 0, "lower"),
        ("time to first token, p50", 1000 * quantile(seen.first_s, 0.5), "ms", None, "lower"),
        ("time to first token, p99", 1000 * quantile(seen.first_s, 0.99), "ms", None, "lower"),
        ("tokens", seen.num_tokens / wall, "1/s", None, "higher"),
        ("events", seen.num_events / wall, "1/s", None, "higher"),
        ("CPU of HTTP per event", 1e6 * cpu / max(1, seen.num_events), "us", 150, "lower"),
        ("memory grown", grown, "MiB", None, "lower"),
    ]
    print(f"{clients} clients with a mix each, {wall:.0f} s")
    for name, value, unit, target, _ in figures:
        aim = "" if target is None else f"   (target {target})"
        print(f"  {name:44} {value:10.1f} {unit}{aim}")
    for line in [*seen.errors, *seen.differing][:5]:
        print("  ", line)
    if file:
        rows = [
            {"work": f"{clients} streams: {name}", "figure": value, "unit": unit, "peer": None,
             "target": target, "better": better}
            for name, value, unit, target, better in figures
        ]  # fmt: skip
        file.write_text(json.dumps({"rows": rows}, indent=1))


if __name__ == "__main__":
    main()
