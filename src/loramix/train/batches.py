"""Rows in the order they are learned, and the micro-batches they are computed in."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loramix.train.data import Row

IGNORED = -100  # the label of a token that is read and not learned
WINDOW = 16  # batches within which rows are sorted by length


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of one or several experts, padded on the right to one length.

    Attention is causal, so no token of a row sees its padding and no mask is needed. Where several
    short rows lie behind each other in one, positions begin at 0 again: transformers reads from
    them that those do not see each other.
    """

    ids: Tensor  # [N, T]
    positions: Tensor  # [N, T], of each token within its row
    labels: Tensor  # [N, T], the token that comes next; IGNORED where that is not learned
    counts: tuple[int, ...]  # lines of ids that belong to each expert, in order
    rows: tuple[tuple[int, int, int], ...]  # line of each row, its first token, and past its last


def epoch_order(lengths: Sequence[int], size: int, seed: int, epoch: int) -> list[list[int]]:
    """An epoch as batches of row numbers, in random order; every row once.

    Rows of a batch have similar lengths, so little is padding: they are compared within windows
    of 16 batches, which keeps the order random. A function of seed and epoch alone: a run that is
    taken up again needs no more than the number of its step.
    """
    rng = random.Random(f"{seed}/{epoch}")
    order = rng.sample(range(len(lengths)), len(lengths))
    groups = []
    for start in range(0, len(order), WINDOW * size):
        window = sorted(order[start : start + WINDOW * size], key=lambda i: lengths[i])
        groups += [window[i : i + size] for i in range(0, len(window), size)]
    rng.shuffle(groups)
    return groups


def file_order(count: int, size: int) -> list[list[int]]:
    """An epoch as batches of row numbers, in the order that the rows have."""
    return [list(range(start, min(start + size, count))) for start in range(0, count, size)]


def micro_batches(
    steps: Sequence[Sequence[Row]],
    *,
    tokens: int,
    rows: int | None = None,
    packing: bool = False,
) -> list[Batch]:
    """One step of each expert, cut into batches of at most `tokens` with padding, and `rows` lines.

    Rows of all experts are sorted by length first, so that those of a batch pad each other little;
    within a batch they are together again. Its size does not grow with the number of experts, so
    several take no more memory than one. A row longer than `tokens` has a batch of its own.
    """
    lines = [(k, line) for k, step in enumerate(steps) for line in _lines(step, tokens, packing)]
    lines.sort(key=lambda one: -_length(one[1]))
    batches: list[list[tuple[int, list[Row]]]] = []
    for k, line in lines:
        if not batches or not _fits(batches[-1], tokens, rows):
            batches.append([])
        batches[-1].append((k, line))
    return [_batch(batch, len(steps)) for batch in batches]


def collate(rows: Sequence[Row]) -> Batch:
    """Rows of one expert, one a line."""
    return _batch([(0, [row]) for row in rows], 1)


def _lines(rows: Sequence[Row], tokens: int, packing: bool) -> list[list[Row]]:
    """The rows that share a line: each by itself, or first-fit by decreasing length."""
    if not packing or not rows:
        return [[row] for row in rows]
    room = min(tokens, max(len(row.ids) for row in rows))
    lines: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: -len(row.ids)):
        fitting = (line for line in lines if _length(line) + len(row.ids) <= room)
        line = next(fitting, None)
        if line is None:
            lines.append([row])
        else:
            line.append(row)
    return lines


def _fits(batch: Sequence[tuple[int, list[Row]]], tokens: int, rows: int | None) -> bool:
    """Whether one more line fits; the first is the longest."""
    padded = (len(batch) + 1) * _length(batch[0][1])
    return padded <= tokens and (rows is None or len(batch) < rows)


def _length(line: Sequence[Row]) -> int:
    return sum(len(row.ids) for row in line)


def _batch(lines: Sequence[tuple[int, list[Row]]], experts: int) -> Batch:
    ordered = sorted(lines, key=lambda line: line[0])
    longest = max(_length(line) for _, line in ordered)
    ids = torch.zeros(len(ordered), longest, dtype=torch.long)
    labels = torch.full_like(ids, IGNORED)
    positions = torch.arange(longest).repeat(len(ordered), 1)
    places = []
    for n, (_, line) in enumerate(ordered):
        start = 0
        for row in line:
            stop = start + len(row.ids)
            ids[n, start:stop] = torch.tensor(row.ids)
            places.append((n, start, stop))
            positions[n, start:] = torch.arange(longest - start)
            for first, last in row.learned:  # token t is predicted at t - 1
                labels[n, start + first - 1 : start + last - 1] = ids[
                    n, start + first : start + last
                ]
            start = stop
    counts = tuple(sum(k == expert for k, _ in ordered) for expert in range(experts))
    return Batch(ids, positions, labels, counts, tuple(places))
