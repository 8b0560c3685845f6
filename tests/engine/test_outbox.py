"""Calls from other threads reach an event loop in order, all of them, with few wake-ups."""

import asyncio
import contextlib
import gc
import threading
import time
import weakref

from loramix.engine.outbox import Outbox, Outboxes


def test_all_calls_of_all_threads_arrive_in_their_order():
    got = []

    async def main():
        box = Outboxes().here()

        def send(name):
            for number in range(2000):
                box.put(got.append, (name, number))

        threads = [threading.Thread(target=send, args=(name,)) for name in "abc"]
        for thread in threads:
            thread.start()
        while len(got) < 6000:
            await asyncio.sleep(0.001)

    asyncio.run(asyncio.wait_for(main(), 20))
    for name in "abc":
        assert [number for who, number in got if who == name] == list(range(2000))


def test_what_comes_together_wakes_the_loop_once():
    calls = []

    class Loop:
        def call_soon_threadsafe(self, call):
            calls.append(call)

    got = []
    loop = Loop()
    box = Outbox(loop)
    for number in range(5):
        box.put(got.append, number)
    assert len(calls) == 1
    calls[0]()
    assert got == [0, 1, 2, 3, 4]
    box.put(got.append, 5)
    assert len(calls) == 2


def test_a_loop_that_has_ended_is_called_no_more_and_not_kept():
    boxes = Outboxes()

    async def here():
        return boxes.here()

    loop = asyncio.new_event_loop()
    box = loop.run_until_complete(here())
    assert loop.run_until_complete(here()) is box
    loop.close()
    box.put(print, "nobody is listening")
    ended = weakref.ref(loop)
    del loop
    gc.collect()
    assert ended() is None
    box.put(print, "nobody is there")


def test_what_is_put_while_boxes_are_held_arrives_together_when_they_are_not():
    got, seen = [], []

    async def main():
        boxes = Outboxes()
        box = boxes.here()

        def step():
            with contextlib.suppress(RuntimeError), boxes.together():
                for number in range(3):
                    box.put(got.append, number)
                    time.sleep(0.02)
                    seen.append(len(got))
                raise RuntimeError("the step failed")
            box.put(got.append, 3)

        await asyncio.to_thread(step)
        while len(got) < 4:
            await asyncio.sleep(0.001)

    asyncio.run(asyncio.wait_for(main(), 20))
    assert seen == [0, 0, 0]
    assert got == [0, 1, 2, 3]
