"""Several processes that train one run: each computes a part of the rows of every step.

Their gradients are summed before anybody steps, so all of them hold the same factors, and those are
what one process would have learned, up to float rounding. A step has the rows that the training
file says, however many compute it. The first process alone writes and tells.

They are begun by the first one on its own machine, or all of them by torchrun or `accelerate
launch`, on one machine or several.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, TypeVar

from loramix.errors import LoramixError, TrainError

if TYPE_CHECKING:
    from multiprocessing.queues import SimpleQueue
    from multiprocessing.synchronize import Semaphore

    from torch import Tensor

Row = TypeVar("Row")
Value = TypeVar("Value")
POLL_S = 0.1
PATIENCE_S = 10.0  # for a process that is about to end
MEETING = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what a launcher sets
# what an accelerate configuration may ask for beside several processes, and why it is refused
LAUNCHED = {
    "ACCELERATE_MIXED_PRECISION": (("no",), "the training file says it (bf16)"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (("1",), "the training file says it"),
    "ACCELERATE_DYNAMO_BACKEND": (("no",), "layers are not compiled"),
    "ACCELERATE_USE_DEEPSPEED": (("false",), "use FSDP, or MULTI_GPU"),
    "FSDP_SHARDING_STRATEGY": (("full_shard", "1"), "the whole base is spread"),
    "FSDP_RESHARD_AFTER_FORWARD": (("true", "full_shard"), "a layer is gathered when needed"),
    "FSDP_OFFLOAD_PARAMS": (("false",), "what is spread stays on its device"),
    "FSDP_ACTIVATION_CHECKPOINTING": (("false",), "the training file says it"),
}


@dataclass(frozen=True, slots=True)
class Processes:
    """How many train this run, and which of them this one is."""

    number: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        return self.number == 0

    def part(self, rows: Sequence[Row]) -> Sequence[Row]:
        """The rows that this process computes; those alike in length go to different ones."""
        return rows[self.number :: self.count]

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Make each tensor the sum of all processes' own, the same bits everywhere."""
        if self.count == 1:
            return
        import torch
        from torch import distributed

        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        sent = flat if distributed.get_backend() == "nccl" else flat.cpu()
        distributed.all_reduce(sent)
        parts = sent.to(flat.device).split_with_sizes([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))

    def totals(self, numbers: Sequence[float]) -> list[float]:
        """Each number summed over all processes, which wait here for each other."""
        if self.count == 1:
            return list(numbers)
        import torch
        from torch import distributed

        device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
        found = torch.tensor(numbers, dtype=torch.float64, device=device)
        self.add([found])
        return found.tolist()

    def any(self, here: bool) -> bool:
        """Whether it is so in any process."""
        return self.totals([here])[0] > 0

    def most(self, here: int) -> int:
        """The largest number that any process has."""
        return int(max(self.totals([here * (k == self.number) for k in range(self.count)])))

    def agreed(self, value: Value) -> Value:
        """What the first process has, in all of them; must be picklable."""
        from torch import distributed

        told = [value]
        distributed.broadcast_object_list(told)
        return told[0]

    def wait(self) -> None:
        """Until all processes are here."""
        self.any(False)


@contextmanager
def together(count: int, assist: Callable[[Processes], None]) -> Iterator[Processes]:
    """The processes of a run; this is the first, or, under a launcher, any of them.

    The others call `assist`, which must be picklable and do what this one does: they meet in every
    `add`. TrainError for what cannot be, and if one of them ends early.
    """
    if count < 1:
        raise TrainError(f"processes is {count}; expected at least 1.")
    if num_launched() > 1:
        if count > 1:
            raise TrainError(
                f"This was started as one of {num_launched()} processes, and the training file "
                f"asks for {count}; leave `processes` out."
            )
        check_launcher(os.environ)
        own = Processes(int(os.environ["RANK"]), num_launched())
        with _joined(own, int(os.environ["LOCAL_RANK"]), "env://"):
            yield own
    elif count > 1:
        with _helped(count, assist) as own:
            yield own
    else:
        yield Processes()


def num_launched() -> int:
    """How many processes torchrun or `accelerate launch` has begun; 1 without them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_sharded_by_launcher() -> bool:
    """Whether accelerate's configuration asks for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def check_launcher(environment: Mapping[str, str]) -> None:
    """TrainError for a launcher's settings that lack something, or that would be ignored."""
    if missing := [name for name in MEETING if name not in environment]:
        raise TrainError(
            f"WORLD_SIZE is {environment.get('WORLD_SIZE')} but {', '.join(missing)} is not set; "
            f"start it by torchrun or `accelerate launch`, or unset WORLD_SIZE."
        )
    for name, (allowed, reason) in LAUNCHED.items():
        if environment.get(name, allowed[0]).lower() not in allowed:
            option = name.removeprefix("ACCELERATE_").lower()
            raise TrainError(
                f"{option}: {environment[name]} of accelerate's configuration is refused: {reason}."
            )


@contextmanager
def _helped(count: int, assist: Callable[[Processes], None]) -> Iterator[Processes]:
    """The other processes live on this machine, as long as this one needs them."""
    context = multiprocessing.get_context("spawn")
    said, ready = context.SimpleQueue(), context.Semaphore(0)
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"file://{Path(folder) / 'meeting'}"
        others = [
            context.Process(
                target=_help, args=(Processes(n, count), meeting, assist, said, ready), daemon=True
            )
            for n in range(1, count)
        ]
        try:
            for other in others:
                other.start()
            _await(others, ready)
            with _joined(Processes(0, count), 0, meeting):
                yield Processes(0, count)
        except RuntimeError as error:  # as torch says that another does not answer
            reason = _lost(others, said)
            if reason is None:
                raise
            raise TrainError(reason) from error
        finally:
            for other in others:
                other.join(PATIENCE_S if other.exitcode is None else 0)
                other.kill()
                other.join()


def _await(others: Sequence[BaseProcess], ready: Semaphore) -> None:
    """Until all are about to meet: who waits at the meeting itself cannot see that one is gone."""
    for _ in others:
        while not ready.acquire(timeout=POLL_S):
            if any(other.exitcode is not None for other in others):
                raise RuntimeError("A process ended before it joined.")


def _lost(others: Sequence[BaseProcess], said: SimpleQueue[str]) -> str | None:
    """What became of the process that ended early, if one did."""
    ended = wait([other.sentinel for other in others], PATIENCE_S)
    if not said.empty():
        return said.get()
    for other in others:
        if other.sentinel in ended:
            other.join()  # a process is gone a moment after its sentinel
        if other.exitcode:
            how = f"by signal {-other.exitcode}" if other.exitcode < 0 else "from outside"
            return (
                f"A process of this run, {other.pid}, was ended {how}; the run goes on from its "
                f"newest checkpoint when it is started again."
            )
    return None


def _help(
    own: Processes,
    meeting: str,
    assist: Callable[[Processes], None],
    said: SimpleQueue[str],
    ready: Semaphore,
) -> None:
    """Be another process of a run; whoever wants it to stop tells the first one."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    Thread(target=_end_with_parent, daemon=True).start()
    try:
        import_module("torch.distributed")  # takes seconds, in which it could be ended
        ready.release()
        with _joined(own, own.number, meeting):
            assist(own)
    except LoramixError as error:
        said.put(str(error))
    except Exception as error:
        said.put(f"A process of this run failed: {type(error).__name__}: {error}"[:1000])


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


@contextmanager
def _joined(own: Processes, place: int, meeting: str) -> Iterator[None]:
    """In the group with the others; each on a device of its own, or with its share of the cores."""
    import torch
    from torch import distributed

    devices, threads = torch.cuda.device_count(), torch.get_num_threads()
    if devices:
        torch.cuda.set_device(place % devices)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, threads // own.count))
    if meeting != "env://" and os.path.isdir("/sys/class/net/lo"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # nobody else is to reach it
    distributed.init_process_group(
        "nccl" if devices >= own.count else "gloo",
        init_method=meeting,
        rank=own.number,
        world_size=own.count,
    )
    try:
        yield
    finally:
        distributed.destroy_process_group()
        torch.set_num_threads(threads)
