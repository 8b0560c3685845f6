"""Who is computed when: budgets, order, positions, gates; no model needed."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loramix.engine.cache import PrefixCache
from loramix.engine.scheduler import Scheduler, Task


class Count:
    """Reads so many rows, adding a token for each."""

    def __init__(self, rows):
        self.left = rows

    @property
    def finished(self):
        return self.left <= 0

    def read(self, logits):
        self.left -= len(logits)
        return [] if self.finished else [0] * len(logits)


def scheduler(**options):
    defaults = {"max_batch": 4, "max_queue": 99, "step_tokens": 8}
    return Scheduler(PrefixCache(0), **(defaults | options))


def task(size, rows=1, weights=()):
    return Task(list(range(100, 100 + size)), size - 1, weights, "", Count(rows))


def run(scheduler):
    """Step until idle; what each step computed, as (task, number of rows)."""
    steps = []
    while not scheduler.is_idle:
        steps.append(run_step(scheduler))
    return steps


def run_step(scheduler):
    batch = scheduler.next_batch()
    for part in batch.parts:
        row = torch.ones(1, 1, part.span.num_rows, 1)
        part.task.history.append(0, row, row)
    scheduler.record(batch, torch.zeros(len(batch.read_rows), 3))
    return [(part.task, part.span.num_rows) for part in batch.parts]


def test_those_who_answer_go_first_and_prompts_follow_in_order():
    queue = scheduler()
    short, long, later = task(1, rows=4), task(12), task(5)
    for item in (short, long, later):
        queue.add(item)
    assert run(queue) == [
        [(short, 1), (long, 7)],
        [(short, 1), (long, 5), (later, 2)],
        [(short, 1), (later, 3)],
        [(short, 1)],
    ]


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(1, 5)), min_size=1, max_size=9),
    st.integers(1, 5),
    st.integers(1, 9),
)
def test_everybody_is_computed_once_within_the_budget(sizes, max_batch, step_tokens):
    queue = scheduler(max_batch=max_batch, step_tokens=step_tokens)
    tasks = [task(size, rows) for size, rows in sizes]
    for item in tasks:
        queue.add(item)
    steps = run(queue)
    for step in steps:
        assert sum(rows for _, rows in step) <= max(step_tokens, max_batch)
        assert len(step) <= max_batch
    for item, (size, rows) in zip(tasks, sizes, strict=True):
        counts = [count for step in steps for other, count in step if other is item]
        assert sum(counts) == size + rows - 1
        assert item.done.done()
    prompts = [item for item, (size, _) in zip(tasks, sizes, strict=True) if size > 1]
    starts = [next(i for i, step in enumerate(steps) if item in dict(step)) for item in prompts]
    assert starts == sorted(starts)  # one-token prompts go first with those who answer


class Adapters:
    """A model with adapters of these ranks."""

    def __init__(self, **ranks):
        self.ranks = ranks
        self.sets = self

    def covering(self, names, spare):
        return [tuple(sorted(names))]


def test_a_batch_lays_tasks_end_to_end_each_with_its_own_positions():
    queue = scheduler()
    first, second = (
        task(3, rows=9, weights=(("b", 0.5),)),
        task(9, weights=(("a", 1.0), ("b", 2.0))),
    )
    queue.add(first)
    queue.add(second)
    batch = queue.next_batch()
    assert batch.tokens == [100, 101, 102, 100, 101, 102, 103, 104]
    assert batch.positions == [0, 1, 2, 0, 1, 2, 3, 4]
    assert batch.read_rows == [2]
    (gates,) = batch.gates(Adapters(a=8, b=8), torch.device("cpu"))
    assert gates.adapters == ("a", "b")
    assert gates.weights[0].tolist() == [[0, 0.5]] * 3 + [[1, 2]] * 5
    queue.record(batch, torch.zeros(1, 3))
    batch = queue.next_batch()
    assert (batch.tokens, batch.positions) == ([0, 105, 106, 107, 108], [3, 5, 6, 7, 8])
    assert batch.read_rows == [0, 4]


def test_only_adapters_at_work_are_in_the_gates():
    queue = scheduler()
    queue.add(task(2))
    assert queue.next_batch().gates(Adapters(), torch.device("cpu")) == []


def test_dropping_frees_memory_and_room_wherever_the_task_is():
    queue = scheduler(max_batch=1, max_queue=2)
    running, waiting = task(2, rows=5), task(2, rows=5)
    for item in (running, waiting):
        assert queue.room.acquire(blocking=False)
        queue.add(item)
    assert not queue.room.acquire(blocking=False)
    batch = queue.next_batch()
    assert [part.task for part in batch.parts] == [running]
    row = torch.ones(1, 1, 2, 1)
    running.history.append(0, row, row)
    queue.drop(running)
    queue.drop(waiting)
    queue.drop(waiting)
    assert running.history.size_bytes == 0
    assert running.done.cancelled()
    assert queue.is_idle
    assert [queue.room.acquire(blocking=False) for _ in range(3)] == [True, True, False]


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(1, 9)), min_size=1, max_size=9),
    st.integers(30, 90),
    st.integers(0, 90),
)
def test_keys_and_values_never_exceed_their_bytes(sizes, kv_tokens, cache_tokens):
    token_bytes = 8  # run() files one number for the keys and one for the values
    queue = Scheduler(
        PrefixCache(cache_tokens * token_bytes),
        max_batch=4,
        max_queue=99,
        step_tokens=8,
        token_bytes=token_bytes,
        kv_bytes=kv_tokens * token_bytes,
    )
    tasks = []
    for size, rows in sizes:
        tokens = list(range(100, 100 + size))
        tasks.append(Task(tokens, size - 1, (), "", Count(rows), size + rows - 1))
        queue.add(tasks[-1])
    while not queue.is_idle:
        run_step(queue)
        held = sum(item.history.size_bytes for item in queue.running)
        assert held <= queue.reserved_bytes
        assert held + queue.cache.size_bytes <= kv_tokens * token_bytes
        assert queue.cache.size_bytes <= cache_tokens * token_bytes
    assert [len(item.tokens) for item in tasks] == [size + rows - 1 for size, rows in sizes]


def test_one_that_does_not_fit_yet_waits_and_nobody_overtakes_it():
    queue = Scheduler(
        PrefixCache(0), max_batch=4, max_queue=9, step_tokens=9, token_bytes=8, kv_bytes=80
    )
    first, large, small = (task(size) for size in (4, 9, 1))
    for item in (first, large, small):
        queue.add(item)
    assert run(queue) == [[(first, 4)], [(small, 1), (large, 8)], [(large, 1)]]


def test_a_long_span_has_gates_of_its_own():
    queue = scheduler(max_batch=5, step_tokens=200)
    sizes_and_weights = [(1, "a"), (2, "b"), (70, "a"), (3, None), (67, None)]
    for size, name in sizes_and_weights:
        queue.add(task(size, weights=((name, 0.5),) if name else ()))
    found = queue.next_batch().gates(Adapters(a=64, b=64), torch.device("cpu"))
    assert [(gates.adapters, gates.span) for gates in found] == [
        (("a", "b"), (0, 3)),
        (("a",), (3, 73)),
    ]
    assert found[0].weights[0].tolist() == [[0.5, 0], [0, 0.5], [0, 0.5]]
    assert found[1].weights.tolist() == [[[0.5]] * 70]


def test_large_adapters_with_many_requests_each_have_gates_of_their_own():
    queue = scheduler(max_batch=9)
    for name in "abcaba":
        queue.add(task(1, weights=((name, 0.5),)))
    batch = queue.next_batch()
    assert [part.task.weights[0][0] for part in batch.parts] == list("aaabbc")
    sizes = {}
    for rank in (16, 1024):
        found = batch.gates(Adapters(a=rank, b=rank, c=rank), torch.device("cpu"))
        sizes[rank] = [(gates.adapters, gates.weights.shape[1]) for gates in found]
    assert sizes[16] == [(("a", "b", "c"), 6)]
    assert sizes[1024] == [(("a",), 3), (("b",), 2), (("c",), 1)]
