"""`loramix eval`: rows with answers in, how well each mix answers them out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from loramix.cli.flags import Json, Machine, Where
from loramix.cli.opening import hush, open_lm
from loramix.cli.printing import print_json, print_table
from loramix.cli.reading import read_answered
from loramix.errors import BadRequest
from loramix.formats.aside import aside
from loramix.lm import check_mix, has_router
from loramix.mix import Mix

if TYPE_CHECKING:
    from loramix.chat import Example
    from loramix.eval.quality import Interval, Quality
    from loramix.lm import LM

Data = Annotated[
    Path, Option("--data", help='Lines like {"query": "...", "answer": "..."}, or "messages".')
]
Mixes = Annotated[
    list[str] | None,
    Option("--mix", "-m", help="MIX, auto or base; repeatable. Default: base, each adapter, auto."),
]


def evaluate(
    where: Where,
    machine: Machine,
    data: Data,
    mix: Mixes = None,
    metric: Annotated[str, Option(help="exact, contains, f1 or module:function.")] = "exact",
    max_tokens: Annotated[
        int | None, Option(min=1, help="Longest answer; default: twice the longest reference.")
    ] = None,
    seed: Annotated[int, Option(min=0, help="Of the intervals.")] = 0,
    answers: Annotated[Path | None, Option(help="Write all answers here, a row a line.")] = None,
    as_json: Json = False,
) -> None:
    """Answer rows under several mixes and score them, with 95 % intervals."""
    hush()
    from loramix.engine.local import LocalEngine
    from loramix.eval.answers import room_for
    from loramix.eval.metrics import find_metric
    from loramix.eval.quality import compare

    examples, names, measure = read_answered(data), _names(where, mix), find_metric(metric)
    if answers is not None and answers.exists():
        raise BadRequest(f"{answers} exists; give another file.")
    with open_lm(where, machine) as lm:
        contestants = {name: _mixes(lm, name, examples) for name in names}
        assert isinstance(lm.engine, LocalEngine)  # open_lm opens no other
        limit = max_tokens or room_for(lm.engine.base, examples)
        found = compare(lm.engine, examples, contestants, measure, max_tokens=limit, seed=seed)
    if answers is not None:
        _write(answers, examples, found)
    about = {"data": data.name, "metric": metric, "num_rows": len(examples), "max_tokens": limit}
    if as_json:
        rows = [_fields(quality) for quality in found]
        print_json({**about, "seed": seed, "base": where.base, "results": rows})
    else:
        _print(found, about)


def _names(where: Where, mixes: Sequence[str] | None) -> list[str]:
    """The contestants, checked before a model is opened."""
    shelf = where.shelf
    names = list(mixes or ("base", *shelf.names(), *(["auto"] if has_router(shelf) else [])))
    for name in names:
        check_mix(name, shelf)
    return list(dict.fromkeys(name if name == "auto" else str(Mix.parse(name)) for name in names))


def _mixes(lm: LM, name: str, examples: Sequence[Example]) -> list[Mix]:
    """The mix of each row: always the same, or what the router says of it."""
    if name == "auto":
        return [lm.route(example.messages[:-1]).mix for example in examples]
    return [Mix.parse(name)] * len(examples)


def _fields(quality: Quality) -> dict[str, Any]:
    fields = asdict(quality)
    del fields["hits"], fields["answers"]
    return fields


def _write(file: Path, examples: Sequence[Example], found: Sequence[Quality]) -> None:
    with aside(file) as new, new.open("w", encoding="utf-8") as lines:
        for n, example in enumerate(examples):
            row = {
                "messages": [asdict(message) for message in example.messages],
                "answers": {quality.name: quality.answers[n] for quality in found},
                "hits": {quality.name: quality.hits[n] for quality in found},
            }
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")


def _print(found: Sequence[Quality], about: dict[str, Any]) -> None:
    titles = ("mix", about["metric"], "95 %", f"gain over {found[0].name}", "truncated", "tokens")
    print_table(titles, [_row(quality, quality is found[0]) for quality in found])
    typer.echo(f"{about['num_rows']} rows, greedy answers of at most {about['max_tokens']} tokens.")


def _row(quality: Quality, is_first: bool) -> tuple[str, ...]:
    score, gain = quality.score, quality.gain
    return (
        quality.name,
        f"{score.mean:.3f}",
        f"{score.low:.3f} to {score.high:.3f}",
        "" if is_first else f"{gain.mean:+.3f} ({_span(gain)})",
        f"{quality.truncated:.1%}",
        f"{quality.num_tokens:.1f}",
    )


def _span(interval: Interval) -> str:
    return f"{interval.low:+.3f} to {interval.high:+.3f}"
