"""`loramix data`: files of rows, before anything is learned from them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from loramix.chat import Message
from loramix.cli.opening import hush, notice
from loramix.cli.rows import show_row
from loramix.errors import BadRequest
from loramix.train.dataset import MAX_BAD, Loaded, Sample, accepted, listed, load, to_rows

data = typer.Typer(help="Check, preview, convert and generate files of training rows.")
File = Annotated[Path, typer.Argument(help="JSON, JSON lines, CSV, parquet or text; may be .gz.")]
Base = Annotated[str, typer.Option(help="Whose tokenizer and chat template.")]
MaxBad = Annotated[float, typer.Option(help="Share of the rows that may be bad.")]
MaxLength = Annotated[int, typer.Option(help="Most tokens of a row.")]


@data.command()
def check(
    file: File,
    base: Base = "pocket",
    max_length: MaxLength = 1024,
    max_bad: MaxBad = MAX_BAD,
) -> None:
    """Say what would be learned of a file, and which rows cannot be, with their lines."""
    hush()
    loaded = load(file)
    with notice("Reading the tokenizer ..."):
        rows, problems = to_rows(_tokenizer(base), loaded.samples, max_length)
    every = [*loaded.problems, *problems]
    accepted(Loaded([sample for sample, _ in rows], every), str(file), max_bad=max_bad)
    if every:
        typer.echo(f"Bad rows: {listed(every)}.", err=True)
    lengths = sorted(len(row.ids) for _, row in rows)
    learned = sum(row.num_learned for _, row in rows)
    twins = len(rows) - len({row.ids for _, row in rows})
    typer.echo(f"{'rows':16} {len(rows)}")
    typer.echo(f"{'bad rows':16} {len(every)}")
    typer.echo(f"{'said twice':16} {twins}")
    typer.echo(f"{'tokens':16} {sum(lengths)}, {learned} of them learned")
    typer.echo(f"{'tokens of a row':16} {lengths[len(lengths) // 2]}, at most {lengths[-1]}")


@data.command("preview")
def preview_(
    file: File, base: Base = "pocket", rows: int = 3, max_length: MaxLength = 1024
) -> None:
    """Show rows as the model reads them; what is learned is green, or in [[brackets]] in a pipe."""
    hush()
    samples = load(file, max_rows=rows)
    tokenizer = _tokenizer(base)
    found, problems = to_rows(tokenizer, samples.samples, max_length, truncate=True)
    every = [*samples.problems, *problems]
    accepted(Loaded([sample for sample, _ in found], every), str(file), max_bad=1.0)
    if every:
        typer.echo(f"Bad rows: {listed(every)}.", err=True)
    for sample, row in found:
        show_row(tokenizer, sample, row)


@data.command()
def convert(file: File, output: Path, max_bad: MaxBad = MAX_BAD) -> None:
    """Write a file's rows as JSON lines of messages, the shape most programs read."""
    if output.exists():
        raise BadRequest(f"{output} exists; give another file.")
    if output.suffix != ".jsonl":
        raise BadRequest(f"{output} must end in .jsonl: rows are written as JSON lines.")
    loaded = load(file)
    samples = accepted(loaded, str(file), max_bad=max_bad)
    new = output.with_name(f".{output.name}.new")
    lines = [json.dumps(_row(sample), ensure_ascii=False) + "\n" for sample in samples]
    new.write_text("".join(lines), encoding="utf-8")
    new.replace(output)
    if loaded.problems:
        typer.echo(f"Left out: {listed(loaded.problems)}.", err=True)
    typer.echo(f"{len(samples)} rows in {output}")


@data.command("generate")
def generate_(
    output: Annotated[Path, typer.Argument(help="New file of JSON lines.")],
    topic: Annotated[str, typer.Option(help="What the rows are about.")],
    n: Annotated[int, typer.Option("--n", help="Rows.")],
    endpoint: Annotated[str | None, typer.Option(help="http://HOST:PORT/v1 that writes.")] = None,
    model: Annotated[str | None, typer.Option(help="Its model; else its own choice.")] = None,
    base: Annotated[str | None, typer.Option(help="Base that writes, instead.")] = None,
    seed: Annotated[int, typer.Option(help="Other seeds, other rows.")] = 0,
    max_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 1024,
) -> None:
    """Have a model write rows about a topic; a run that was cut off goes on where it was."""
    from loramix.endpoint import Endpoint
    from loramix.generate import diversity, generate

    if (endpoint is None) == (base is None) or (model and base):
        raise BadRequest("Give --endpoint, with --model if it has several, or else --base.")
    writing = nullcontext(Endpoint(endpoint, model, max_tokens)) if endpoint else None
    with writing or _written_by(str(base), max_tokens) as write:
        journal = generate(topic, n, write, output, seed=seed, told=_count(n))
    found, dropped = diversity(journal.rows[:n]), journal.dropped.most_common()
    typer.echo(f"{found.num_rows} rows in {output}, of {journal.num_requests} requests")
    typer.echo(f"{'dropped':24} {', '.join(f'{why} {times}' for why, times in dropped) or 'none'}")
    typer.echo(f"{'new pairs of words':24} {found.distinct_pairs:.0%}")
    typer.echo(f"{'openings of their own':24} {found.openings:.0%}")
    typer.echo(f"{'words shared with nearest':24} {found.nearest:.0%}")
    typer.echo(f"{'words of an answer':24} {found.mean_words:.1f}")


@contextmanager
def _written_by(base: str, max_tokens: int) -> Iterator[Callable[[str, int], str]]:
    """A base opened here, as a writer."""
    hush()
    from loramix import lm
    from loramix.engine import Sampling

    with notice(f"Opening {base} ..."):
        opened = lm.open(base, router=False)
    with opened:

        def write(prompt: str, seed: int) -> str:
            how = Sampling(temperature=0.9, seed=seed, max_tokens=max_tokens, fit=True)
            return opened.ask(prompt, "base", sampling=how).text

        yield write


def _count(n: int) -> Callable[[int], None]:
    """A count of rows that a terminal shows in place."""
    if not sys.stderr.isatty():
        return lambda num_rows: None
    return lambda num_rows: typer.echo(f"\r{num_rows} of {n} rows", err=True, nl=num_rows == n)


def _row(sample: Sample) -> dict[str, Any]:
    messages = sample.example.messages
    if len(messages) == 1:
        return {"text": messages[0].content}
    row: dict[str, Any] = {"messages": [_turn(message) for message in messages]}
    return {**row, "tools": list(sample.tools)} if sample.tools else row


def _turn(message: Message) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.calls:
        turn["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in message.calls
        ]
    if message.call_id:
        turn["tool_call_id"] = message.call_id
    return turn


def _tokenizer(base: str) -> Any:
    from transformers import AutoTokenizer

    from loramix.folders import POCKET_BASE

    path = str(POCKET_BASE) if base == "pocket" else base
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise BadRequest(f"Cannot open the tokenizer of {base!r}: {reason}") from error
