"""Twenty minutes of everything at once, twice: `pytest -m slow tests/engine/test_soak.py`.

Once in float32, where every token must be its reference's; once in bfloat16 with the C functions of
large bases, where those must be that no close call comes before. SOAK_MINUTES in the environment
changes how long.
"""

import asyncio
import contextlib
import os
import random
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from loramix.engine import Request, Sampling
from loramix.engine.local import LocalEngine
from loramix.errors import Busy
from loramix.formats import peft
from loramix.library import Library
from loramix.lora import size_bytes
from loramix.mix import Mix
from tests.test_tiles import needs_tiles
from tests.tiny import folded, random_adapter, tiny_base, tiny_model

# oneDNN keeps the kernels of the last 1024 shapes, of which only then no more come (docs/log.md).
for cache in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
    os.environ.setdefault(cache, "64")

MINUTES = float(os.environ.get("SOAK_MINUTES", "20"))
CLIENTS = 24
FLAT_BYTES = 32 << 20  # more than this between the first quarter and the end is a leak
NEAR = 0.12  # between the two best logits, of a size of about one: bfloat16 may choose the other

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc"),
]


def resident_bytes():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def spread(memory):
    return [memory[n * (len(memory) - 1) // 8] >> 20 for n in range(9)]


@dataclass(frozen=True)
class Right:
    """An answer made alone, in float32, and how many of its tokens are no close call."""

    tokens: tuple[int, ...]
    num_sure: int

    def admits(self, found):
        if self.num_sure == len(self.tokens):
            return found == self.tokens
        return found[: self.num_sure] == self.tokens[: self.num_sure]


def answered_alone(request, adapters, model, near):
    ids = torch.tensor([request.prompt])
    output = folded(model, request.mix, adapters).generate(
        ids,
        max_new_tokens=request.sampling.max_tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    gaps = [
        float(best[0] - second[0])
        for best, second in (logits.topk(2).values.T.split(1) for logits in output.logits)
    ]
    num_sure = next((n for n, gap in enumerate(gaps) if gap < near), len(gaps))
    return Right(tuple(output.sequences[0, len(request.prompt) :].tolist()), num_sure)


def workload(adapters, hot, model, near):
    """Requests, and for each the answers that are right: one for each content of "hot"."""
    draw, found = random.Random(1), []
    names = sorted(adapters)
    for _ in range(60):
        prompt = tuple(draw.choices(range(3, 267), k=draw.choice([1, 3, 9, 20, 70])))
        picked = draw.sample([*names, "hot"], draw.choice([0, 1, 1, 2, 3]))
        mix = Mix({name: round(draw.uniform(-1.2, 1.5), 2) for name in picked})
        sampling = Sampling(temperature=0, max_tokens=draw.choice([1, 4, 12, 40]))
        request = Request(prompt, mix, sampling)
        contents = hot if "hot" in mix else hot[:1]
        right = [answered_alone(request, adapters | {"hot": h}, model, near) for h in contents]
        found.append((request, right))
    return found


def rounded(adapter, dtype):
    """Its factors as a base of this precision holds them."""
    return replace(
        adapter,
        pairs={k: p.to(dtype).to(torch.float32) for k, p in adapter.pairs.items()},
    )


@pytest.mark.parametrize(
    ("dtype", "tiles", "near"),
    [
        pytest.param(torch.float32, False, 0.0, id="float32"),
        pytest.param(torch.bfloat16, True, NEAR, id="tiles", marks=needs_tiles),
    ],
)
def test_nothing_is_lost_wrong_or_left_behind(tmp_path, dtype, tiles, near):
    base = tiny_base()
    base.model.to(dtype)
    model = tiny_model().to(dtype).float()  # of the same weights, to answer alone
    adapters = {
        f"a{n}": rounded(random_adapter(model, f"a{n}", rank=1 + n, seed=n, share=0.7), dtype)
        for n in range(8)
    }
    hot = [rounded(random_adapter(model, "hot", rank=4, seed=seed), dtype) for seed in (50, 51)]
    library = Library(tmp_path)
    for adapter in adapters.values():
        peft.write(adapter, tmp_path / adapter.name)
    sizes = [size_bytes(adapter.pairs.values(), dtype) for adapter in [*adapters.values(), hot[0]]]
    work = workload(adapters, hot, model, near)
    torch.set_num_threads(1)
    with LocalEngine(
        base,
        hot[:1],
        library,
        max_batch=16,
        max_queue=32,
        step_tokens=48,
        kv_bytes=8 << 20,
        adapter_bytes=sum(sizes) - min(sizes),  # somebody always has to leave
        tiles=tiles,
    ) as engine:
        counts, memory = asyncio.run(soak(engine, work, hot))
        assert engine._scheduler.is_idle
        assert not any(resident.num_users for resident in engine._loaded._residents._all())
    sure = [right.num_sure / len(right.tokens) for _, answers in work for right in answers]
    sys.stderr.write(
        f"{counts}, {sum(sure) / len(sure):.0%} of the tokens told for certain, "
        f"memory in MiB from start to end: {spread(memory)}\n"
    )
    assert min(counts.values()) > 0
    assert counts["answered"] + counts["cancelled"] == counts["asked"]
    settled = memory[len(memory) // 4 :]
    assert max(settled) - settled[0] < FLAT_BYTES


async def soak(engine, work, hot):
    end = time.monotonic() + 60 * MINUTES
    counts = dict.fromkeys(("asked", "answered", "cancelled", "busy", "replaced"), 0)
    memory = [resident_bytes()]

    async def client(number):
        draw = random.Random(number)
        while time.monotonic() < end:
            request, right = draw.choice(work)
            kind = draw.choice(["whole", "whole", "cancelled", "several", "kept"])
            counts["asked"] += 1
            while not (found := await ask(request, kind, draw)):
                await asyncio.sleep(draw.uniform(0, 0.05))  # the queue was full
            if kind == "cancelled":
                counts["cancelled"] += 1
                continue
            counts["answered"] += 1
            if kind != "kept":  # whose history may be another mix's
                wrong = [one for one in found if not any(each.admits(one) for each in right)]
                assert not wrong, (request, wrong, right)
            if draw.random() < 0.2:
                await asyncio.sleep(draw.uniform(0, 0.2))

    async def ask(request, kind, draw):
        """The tokens of each answer; nothing if the engine was busy."""
        if kind == "several":
            request = replace(request, n=2)
        if kind == "kept":
            request = replace(request, history="keep")
        request = replace(request, sampling=replace(request.sampling, logprobs=0))
        found = {n: [] for n in range(request.n)}
        stream = engine.stream(request)
        try:
            async for chunk in stream:
                found[chunk.index] += [one.token for one in chunk.logprobs]
                if kind == "cancelled" and draw.random() < 0.5:
                    break
        except Busy:
            counts["busy"] += 1
            return None
        finally:
            await stream.aclose()
        return [tuple(tokens) for tokens in found.values()]

    async def change():
        for turn in range(1, 1 << 60):
            if time.monotonic() > end:
                return
            with contextlib.suppress(Busy):  # those in memory are all at work
                await asyncio.to_thread(engine.add, hot[turn % 2])
                counts["replaced"] += 1
            memory.append(resident_bytes())
            await asyncio.sleep(0.3)

    await asyncio.gather(change(), *(client(number) for number in range(CLIENTS)))
    return counts, memory
