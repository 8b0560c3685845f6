"""Files of rows as people have them, read with the line of every row.

JSON, JSON lines, CSV, parquet and plain text, each also gzipped. A row that cannot be read is a
`Problem` with its line; a file that cannot be read is a TrainError.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from loramix.errors import TrainError

KINDS = ("json", "jsonl", "csv", "tsv", "parquet", "txt")
MAX_LINE = 16 * 2**20  # bytes; a longer one is a mistake, and would fill the memory
SPACE = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True, slots=True)
class Problem:
    """A row that cannot be learned, and why."""

    line: int
    what: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.what}"


Record = tuple[int, Any]  # the line it begins at, and what is there


def read(path: Path) -> Iterator[Record | Problem]:
    """The rows of a file. TrainError if it is not there, not of a known kind, or not readable."""
    kind = _kind(path)
    if not path.is_file():
        raise TrainError(f"{path} does not exist; expected a file of rows ({', '.join(KINDS)}).")
    if path.stat().st_size == 0:
        raise TrainError(f"{path} is empty; expected at least one row.")
    try:
        if kind == "parquet":
            yield from _parquet(path)
            return
        opened: IO[bytes] = gzip.open(path) if path.suffix == ".gz" else path.open("rb")  # type: ignore[assignment]  # noqa: SIM115
        with opened as file:
            yield from _READERS[kind](file, path)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise TrainError(f"{path} is not a whole gzip file ({error}); fetch it again.") from error


def _kind(path: Path) -> str:
    name = path.name.removesuffix(".gz")
    kind = name.rpartition(".")[2].lower()
    kind = {"ndjson": "jsonl", "text": "txt"}.get(kind, kind)
    if kind not in KINDS or (kind == "parquet" and path.suffix == ".gz"):
        raise TrainError(f"{path} is of no kind that can be read; expected {', '.join(KINDS)}.")
    return kind


def _lines(file: IO[bytes], path: Path) -> Iterator[tuple[int, str] | Problem]:
    """Lines that are not blank, as text."""
    number = 0
    while line := file.readline(MAX_LINE + 1):
        number += 1
        if number == 1 and line[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise TrainError(f"{path} is UTF-16; save it as UTF-8.")
        if len(line) > MAX_LINE:
            yield Problem(number, f"longer than {MAX_LINE >> 20} MiB; split it, or drop it")
            while line and not line.endswith(b"\n"):
                line = file.readline(MAX_LINE)
            continue
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            yield Problem(number, f"not UTF-8 (byte {error.object[error.start]:#04x}); convert it")
            continue
        if text.strip():
            yield number, text


def _jsonl(file: IO[bytes], path: Path) -> Iterator[Record | Problem]:
    for found in _lines(file, path):
        if isinstance(found, Problem):
            yield found
            continue
        number, text = found
        try:
            yield number, json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            yield Problem(number, f"not JSON ({_reason(error)}); expected one object a line")


def _json(file: IO[bytes], path: Path) -> Iterator[Record | Problem]:
    """The items of a list, each with the line it begins at."""
    text = _whole(file, path)
    decoder = json.JSONDecoder()
    place = _skip(text, 0)
    if text[place : place + 1] == "{" and "\n{" in text[place:].strip():
        yield from _jsonl(io.BytesIO(text.encode()), path)  # lines, named .json by mistake
        return
    if text[place : place + 1] != "[":
        raise TrainError(f"{path} is not a list of rows; expected [{{...}}, ...] or lines of JSON.")
    place, line, counted = _skip(text, place + 1), 1, 0
    while text[place : place + 1] != "]":
        line += text.count("\n", counted, place)
        counted = place
        try:
            item, place = decoder.raw_decode(text, place)
            yield line, item
            place = _skip(text, place)
            if text[place : place + 1] == ",":
                place = _skip(text, place + 1)
            elif text[place : place + 1] != "]":
                raise json.JSONDecodeError("Expecting ',' delimiter", text, place)
        except (json.JSONDecodeError, RecursionError) as error:
            at = text.count("\n", 0, error.pos) + 1 if isinstance(error, ValueError) else line
            raise TrainError(
                f"{path} is broken at line {at}: {_reason(error)}; mend it, or save it as JSON "
                f"lines, of which single ones may be broken."
            ) from error


def _csv(file: IO[bytes], path: Path) -> Iterator[Record | Problem]:
    text = _whole(file, path)
    csv.field_size_limit(MAX_LINE)
    lines = io.StringIO(text, newline="")
    tabs = path.name.removesuffix(".gz").endswith("tsv")
    reader = csv.DictReader(lines, delimiter="\t" if tabs else ",", strict=True)
    try:
        for row in reader:
            if None in row:
                yield Problem(reader.line_num, f"more fields than the {len(row) - 1} of the header")
            elif None in row.values():
                yield Problem(reader.line_num, f"fewer fields than the {len(row)} of the header")
            else:
                yield reader.line_num, row
    except csv.Error as error:
        raise TrainError(
            f"{path} is broken at line {reader.reader.line_num}: {error}; mend it."
        ) from error


def _txt(file: IO[bytes], path: Path) -> Iterator[Record | Problem]:
    for found in _lines(file, path):
        yield found if isinstance(found, Problem) else (found[0], {"text": found[1].strip()})


def _parquet(path: Path) -> Iterator[Record | Problem]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise TrainError(
            "Reading parquet needs pyarrow; `pip install 'loramix[parquet]'`, or save JSON lines."
        ) from error
    try:
        number = 0
        for batch in parquet.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (ArrowException, OSError) as error:
        raise TrainError(f"{path} is not a whole parquet file ({_reason(error)}).") from error


def _whole(file: IO[bytes], path: Path) -> str:
    raw = file.read()
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise TrainError(f"{path} is UTF-16; save it as UTF-8.")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise TrainError(
            f"{path} is not UTF-8 at line {line} (byte {raw[error.start]:#04x}); convert it."
        ) from error


def _skip(text: str, place: int) -> int:
    found = SPACE.match(text, place)
    return found.end() if found else place


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error).split("\n")[0]


_READERS = {"json": _json, "jsonl": _jsonl, "csv": _csv, "tsv": _csv, "txt": _txt}
