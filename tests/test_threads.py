"""Small work runs on one thread, and those who compute afterwards have theirs again."""

import contextlib
import os
import sys
import threading

import pytest
import torch

from loramix.formats import peft
from loramix.threads import BEHIND, aside, single_threaded
from tests.tiny import random_adapter, tiny_model


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_one_thread_meanwhile_and_as_many_as_before_after_it(two_threads):
    with contextlib.suppress(ValueError), single_threaded() as count:
        assert (count, torch.get_num_threads()) == (2, 1)
        with single_threaded() as inner:
            assert inner == 1
        assert torch.get_num_threads() == 1
        raise ValueError("ends")
    assert torch.get_num_threads() == 2


def test_two_that_overlap_leave_new_threads_as_many_as_there_were(two_threads):
    begun, found = threading.Event(), []

    def other():
        with single_threaded():
            begun.set()

    with single_threaded():
        thread = threading.Thread(target=other)
        thread.start()
        assert begun.wait(10)
        thread.join()
    later = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert found == [2]


def test_an_adapter_is_read_by_one_thread(two_threads, tmp_path, monkeypatch):
    peft.write(random_adapter(tiny_model(), "a"), tmp_path / "a")
    seen, pairs = [], peft._pairs

    def watched(*given):
        seen.append(torch.get_num_threads())
        return pairs(*given)

    monkeypatch.setattr(peft, "_pairs", watched)
    peft.read(tmp_path / "a")
    assert seen == [1]
    assert torch.get_num_threads() == 2


def test_what_is_done_aside_has_one_thread_and_its_failure_is_the_callers(two_threads):
    assert aside(torch.get_num_threads) == 1
    assert torch.get_num_threads() == 2
    with pytest.raises(ValueError, match="no number"):
        aside(lambda: int("no number"))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has priorities of threads")
def test_what_is_done_aside_is_behind_and_the_caller_is_not():
    def nice():
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    before = nice()
    assert aside(nice) == min(19, before + BEHIND)
    assert nice() == before
