"""What must hold for every engine: a mix means the sum of its updates, whatever runs beside it.

The reference is transformers' own `generate` on a copy of the model with the mix folded into its
weights, one request at a time, in float32.
"""

import asyncio
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loramix.engine import Request, Sampling, scheduler
from loramix.engine.local import LocalEngine
from loramix.mix import Mix
from tests.tiny import folded, random_adapter, tiny_base, tiny_model

ENGINES = {"local": LocalEngine}  # each a (base, adapters) -> engine to use in a `with` block

RANKS = {"a": 3, "b": 7, "c": 1}
PLAIN = {  # unequal ranks, missing layers
    name: random_adapter(tiny_model(), name, rank=rank, seed=rank, share=0.7)
    for name, rank in RANKS.items()
}
ADAPTERS = PLAIN | {"d": random_adapter(tiny_model(), "d", rank=2, seed=9, dora=True)}

weights = st.floats(-1.5, 1.5).map(lambda w: round(w, 2))
mixes = st.dictionaries(st.sampled_from(sorted(PLAIN)), weights, max_size=3).map(Mix)
mixes |= st.just(Mix({"d": 1}))
prompts = st.lists(st.integers(3, 267), min_size=1, max_size=14).map(tuple)
lengths = st.integers(1, 10)
requests = st.builds(
    lambda prompt, mix, length: Request(prompt, mix, Sampling(temperature=0, max_tokens=length)),
    prompts,
    mixes,
    lengths,
)
several = st.lists(requests, min_size=1, max_size=6)
few = settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(params=ENGINES)
def open_engine(request, own_gates):
    return ENGINES[request.param]


@pytest.fixture(params=[scheduler.OWN_GATES, 4], ids=["side by side", "spans of their own"])
def own_gates(request, monkeypatch):
    """These prompts are short: with 4, most have gates of their own, as long ones do."""
    monkeypatch.setattr(scheduler, "OWN_GATES", request.param)


@cache
def alone(request):
    """The tokens of a request by itself, through transformers, with its mix folded in."""
    model = folded(tiny_model(), request.mix, ADAPTERS)
    ids = torch.tensor([request.prompt])
    steps = request.sampling.max_tokens
    output = model.generate(ids, max_new_tokens=steps, do_sample=False, use_cache=True)
    return tuple(output[0, len(request.prompt) :].tolist())


@few
@given(several)
def test_a_batch_of_mixes_equals_each_request_alone_on_folded_weights(open_engine, batch):
    with open_engine(tiny_base(), ADAPTERS.values()) as engine:
        answers = engine.generate(batch)
    assert [answer.tokens for answer in answers] == [alone(request) for request in batch]


@few
@given(several)
def test_the_empty_mix_is_the_base_bit_for_bit(open_engine, batch):
    bare = [Request(request.prompt) for request in batch]
    beside = [bare[0], *batch[1:]]  # the first keeps the base, its neighbours have mixes
    texts = ["the answer"] * len(batch)
    with open_engine(tiny_base(), ()) as engine:
        wanted = engine.score(bare, texts)
    with open_engine(tiny_base(), ADAPTERS.values()) as engine:
        assert engine.score(bare, texts) == wanted
    with open_engine(tiny_base(), ADAPTERS.values()) as engine:
        assert engine.score(beside, texts)[0] == wanted[0]


@few
@given(several)
def test_a_score_is_the_likelihood_under_folded_weights(open_engine, batch):
    base = tiny_base()
    text = "the end"
    targets = base.tokenizer(text)["input_ids"]
    with open_engine(base, ADAPTERS.values()) as engine:
        scores = engine.score(batch, [text] * len(batch))
    for request, score in zip(batch, scores, strict=True):
        model = folded(tiny_model(), request.mix, ADAPTERS)
        logits = model(torch.tensor([[*request.prompt, *targets]])).logits[0].log_softmax(-1)
        rows = logits[len(request.prompt) - 1 : -1]
        wanted = rows.gather(1, torch.tensor(targets)[:, None]).sum()
        torch.testing.assert_close(torch.tensor(score), wanted, rtol=1e-4, atol=1e-4)


@few
@given(several, st.lists(st.integers(0, 6), min_size=6, max_size=6), st.sets(st.integers(0, 5)))
def test_arrivals_and_cancellations_change_no_neighbour(open_engine, batch, delays, cancelled):
    async def one(engine, number):
        await asyncio.sleep(delays[number] / 1000)
        chunks, stream = [], engine.stream(batch[number])
        async for chunk in stream:
            chunks.append(chunk)
            if number in cancelled:
                await stream.aclose()
        return chunks

    async def everyone(engine):
        return await asyncio.gather(*(one(engine, number) for number in range(len(batch))))

    with open_engine(tiny_base(), ADAPTERS.values()) as engine:
        streamed = asyncio.run(everyone(engine))
        answers = engine.generate(batch)
    for number, (chunks, answer) in enumerate(zip(streamed, answers, strict=True)):
        assert answer.tokens == alone(batch[number])
        if number not in cancelled:
            assert "".join(chunk.text for chunk in chunks) == answer.text
            assert sum(chunk.num_tokens for chunk in chunks) == answer.num_tokens
            assert [chunk.finish for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
            assert chunks[-1].finish == answer.finish
            assert chunks[-1].num_prompt_tokens == len(batch[number].prompt)


@few
@given(prompts, st.lists(st.tuples(mixes, lengths, st.integers(0, 14)), min_size=2, max_size=6))
def test_prefix_reuse_changes_nothing_and_never_crosses_mixes(open_engine, prompt, turns):
    with open_engine(tiny_base(), ADAPTERS.values()) as engine:
        computed = {mix: [] for mix, _, _ in turns}
        for mix, length, cut in turns:
            sampling = Sampling(temperature=0, max_tokens=length)
            request = Request(prompt[:cut] or prompt, mix, sampling)
            answer = engine.generate([request])[0]
            assert answer.tokens == alone(request)
            shared = [shared_prefix(request.prompt[:-1], tokens) for tokens in computed[mix]]
            assert answer.num_cached_tokens == max(shared, default=0)
            computed[mix].append((*request.prompt, *answer.tokens[:-1]))


def shared_prefix(a, b):
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


@few
@given(requests.filter(lambda request: "a" in request.mix))
def test_a_replaced_adapter_answers_as_itself_and_reuses_nothing(open_engine, request):
    other = random_adapter(tiny_model(), "a", rank=4, seed=99)
    with open_engine(tiny_base(), ADAPTERS.values()) as engine:
        assert engine.generate([request])[0].tokens == alone(request)
        engine.add(other)
        with open_engine(tiny_base(), (ADAPTERS | {"a": other}).values()) as fresh:
            wanted = fresh.generate([request])[0]
        replaced = engine.generate([request])[0]
        assert replaced == wanted
        assert replaced.num_cached_tokens == 0
        engine.add(ADAPTERS["a"])
        assert engine.generate([request])[0].tokens == alone(request)


@few
@given(requests)
def test_the_name_of_a_mix_replays_its_answer(open_engine, request):
    again = Request(request.prompt, Mix.parse(str(request.mix)), request.sampling)
    with open_engine(tiny_base(), ADAPTERS.values()) as engine:
        first, second = (engine.generate([r])[0] for r in (request, again))
    assert (first.tokens, first.text) == (second.tokens, second.text)
