"""Bytes are written past the page cache, or through it, and are the same."""

from __future__ import annotations

import errno
import os
import time

import pytest
import torch

from loramix.cli import main
from loramix.merge import ahead, output
from loramix.merge.output import PAGE, Output, Room, write_all


@pytest.mark.parametrize("place", [0, 8, PAGE - 2, PAGE, 3 * PAGE + 120])
@pytest.mark.parametrize("count", [1, 7, PAGE // 2, PAGE, 5 * PAGE + 3])
def test_what_is_written_anywhere_is_read_there(tmp_path, place, count):
    end = place + 2 * count
    with Output(tmp_path / "file", end + 9) as file:
        write_all(file.file, memoryview(b"\xff" * (end + 9)), 0)
        data = Room(2 * count).at(place, (count,), torch.int16)
        data.copy_(torch.arange(count))
        file.write(data, place)
    raw = (tmp_path / "file").read_bytes()
    assert raw[place:end] == data.numpy().tobytes()
    assert raw[:place] + raw[end:] == b"\xff" * (place + 9)


def test_memory_that_lies_otherwise_is_written_too(tmp_path):
    memory = torch.arange(5 * PAGE, dtype=torch.int32)
    for first in (0, 1, 77):
        with Output(tmp_path / "file", 4 * memory.numel()) as file:
            file.write(memory[first:], 4 * first)
            file.write(memory[:first], 0)
        assert (tmp_path / "file").read_bytes() == memory.numpy().tobytes()


def test_whole_pages_go_past_the_cache_and_the_rest_through_it(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(output, "write_all", lambda file, data, at: written.append((file, at)))
    with Output(tmp_path / "file", 9 * PAGE) as file:
        if file._direct is None:
            pytest.skip("this file system only writes through the cache")
        file.write(Room(3 * PAGE).at(PAGE + 10, (3 * PAGE,), torch.uint8), PAGE + 10)
        through, past = file.file, file._direct
    assert written == [(through, PAGE + 10), (past, 2 * PAGE), (through, 4 * PAGE)]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSPC])
def test_a_file_system_that_cannot_is_written_through_the_cache(tmp_path, monkeypatch, number):
    whole, tried = write_all, []
    with Output(tmp_path / "file", 4 * PAGE) as file:
        past = file._direct

        def write(target, data, place):
            if target == past:
                tried.append(place)
                raise OSError(number, os.strerror(number))
            whole(target, data, place)

        monkeypatch.setattr(output, "write_all", write)
        data = Room(4 * PAGE).at(0, (4 * PAGE,), torch.uint8).fill_(7)
        if number == errno.ENOSPC and past is not None:
            with pytest.raises(OSError, match="No space"):
                file.write(data, 0)
            return
        file.write(data, 0)
        file.write(data, 0)
        assert len(tried) <= 1
    assert (tmp_path / "file").read_bytes() == b"\x07" * 4 * PAGE


def test_what_a_base_has_is_read_ahead_and_no_more(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(os, "posix_fadvise", lambda file, *rest: asked.append(rest[:2]))
    monkeypatch.setattr(ahead, "MOST", 250)
    for name, size in (("a.safetensors", 100), ("b.safetensors", 200), ("c.safetensors", 9)):
        (tmp_path / name).write_bytes(bytes(size))
    (tmp_path / "a.json").write_bytes(bytes(50))
    ahead.read_ahead(tmp_path)
    until = time.monotonic() + 10
    while len(asked) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    assert asked == [(0, 100), (0, 150)]


def test_a_base_that_is_not_there_is_the_merges_error(tmp_path, capsys):
    words = ["merge", "-m", "sql", "--into", str(tmp_path / "none"), "-o", str(tmp_path / "out")]
    assert main(words) == 1
    assert "none" in capsys.readouterr().err
