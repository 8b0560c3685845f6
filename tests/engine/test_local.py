"""What the embedded engine does beyond the invariants: limits, failures, threads, replacement."""

import asyncio
import contextlib
import itertools
import math
import threading
import time
from dataclasses import replace

import pytest
import torch

from loramix.chat import Message
from loramix.engine import Request, Sampling
from loramix.engine.exact import require_exact
from loramix.engine.local import LocalEngine
from loramix.errors import (
    AdapterError,
    BadRequest,
    BaseMismatch,
    Busy,
    EngineError,
    TooLong,
    UnknownAdapter,
)
from loramix.formats import peft
from loramix.library import Library
from loramix.lora import Pair, size_bytes
from loramix.mix import Mix
from loramix.mixed import linear_shapes
from tests.tiny import folded, random_adapter, tiny_base, tiny_model

PROMPTS = ("the cat", "in", "on the other hand we see a thing that is longer", "a")
MIXES = (Mix(), Mix({"a": 1}), Mix({"a": 0.45, "b": -0.55}), Mix({"b": 2}))


def greedy(prompt, mix=Mix(), max_tokens=20, **options):
    return Request(prompt, mix, Sampling(temperature=0, max_tokens=max_tokens, **options))


def two_adapters(model):
    return [random_adapter(model, "a", rank=3, seed=1), random_adapter(model, "b", rank=5, seed=2)]


@pytest.fixture
def base():
    return tiny_base()


@pytest.fixture
def engine(base):
    with LocalEngine(base, two_adapters(base.model)) as engine:
        yield engine


async def texts(engine, request):
    return [chunk.text async for chunk in engine.stream(request)]


def test_every_architecture_answers_as_transformers_does(architecture):
    base = tiny_base(architecture)
    adapters = {adapter.name: adapter for adapter in two_adapters(base.model)}
    wanted = []
    for prompt, mix in zip(PROMPTS, MIXES, strict=True):
        ids = torch.tensor([base.tokenizer(prompt)["input_ids"]])
        model = folded(base.model, mix, adapters)
        output = model.generate(ids, max_new_tokens=20, do_sample=False)
        wanted.append(tuple(output[0, ids.shape[1] :].tolist()))
    with LocalEngine(base, adapters.values(), step_tokens=7) as engine:
        answers = engine.generate([greedy(p, m) for p, m in zip(PROMPTS, MIXES, strict=True)])
    assert [answer.tokens for answer in answers] == wanted


def test_in_bfloat16_a_mix_is_still_its_own(base):
    base.model.to(torch.bfloat16)
    with LocalEngine(base, two_adapters(base.model)) as engine:
        answers = engine.generate([greedy("the cat", mix) for mix in MIXES])
    assert len({answer.tokens for answer in answers}) == len(MIXES)


def test_an_adapter_takes_the_bases_precision_or_keeps_its_own():
    base = tiny_base()
    base.model.bfloat16()
    adapter = random_adapter(base.model, "a", seed=3)
    request = Request("a sentence", Mix.parse("a"))
    with LocalEngine(base) as engine:
        scores = []
        for aligned in (True, False):
            engine.add(adapter, aligned=aligned)
            scores += engine.score([request], [" and its end"])
            dtypes = {b.a.dtype for layer in engine._core.mixed.layers.values()
                      for b in layer.bound.values()}  # fmt: skip
            assert dtypes == {torch.bfloat16 if aligned else torch.float32}
    assert scores[0] != scores[1]  # never from the other one's keys and values
    assert scores[0] == pytest.approx(scores[1], rel=0.05)


def test_a_conversation_goes_through_the_chat_template(engine, base):
    messages = (Message("user", "the cat"),)
    ids = base.tokenizer.apply_chat_template(
        [{"role": "user", "content": "the cat"}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    chat, raw = engine.generate([greedy(messages), greedy(tuple(ids))])
    assert (chat.text, chat.num_prompt_tokens) == (raw.text, len(ids))


def test_what_a_chat_template_refuses_is_a_bad_request(engine, base):
    base.tokenizer.chat_template = "{{ raise_exception('no system turns') }}"
    with pytest.raises(BadRequest, match="no system turns"):
        engine.generate([greedy((Message("system", "be brief"), Message("user", "hi")))])


def test_a_stop_string_ends_the_answer_and_is_not_part_of_it(engine):
    whole = engine.generate([greedy("the cat")])[0]
    stop = whole.text[4:7]
    stopped = engine.generate([greedy("the cat", stop=(stop,))])[0]
    assert stopped.text == whole.text[: whole.text.index(stop)]
    assert stopped.finish == "stop"
    assert stopped.num_tokens < whole.num_tokens
    assert "".join(asyncio.run(texts(engine, greedy("the cat", stop=(stop,))))) == stopped.text


def test_an_end_token_ends_the_answer_without_text(base):
    free = tiny_base()
    with LocalEngine(free) as engine:
        whole = engine.generate([greedy("the cat")])[0]
    base.model.generation_config.eos_token_id = [2, whole.tokens[5]]
    with LocalEngine(base) as engine:
        ended = engine.generate([greedy("the cat")])[0]
    last = whole.tokens.index(whole.tokens[5]) + 1
    assert (ended.tokens, ended.finish) == (whole.tokens[:last], "stop")
    assert whole.text.startswith(ended.text)


def test_a_seed_gives_the_same_answer_whatever_runs_beside_it(engine):
    seeded = Request("the cat", MIXES[2], Sampling(temperature=1.5, seed=5, max_tokens=12))
    others = [Request(p, m, Sampling(temperature=1, max_tokens=9)) for p, m in zip(PROMPTS, MIXES)]  # noqa: B905
    alone = engine.generate([seeded])[0]
    beside = engine.generate([*others, seeded])[-1]
    assert alone.tokens == beside.tokens


def test_within_few_bytes_the_answers_are_the_same(base):
    requests = [greedy(p, m) for p, m in zip(PROMPTS, MIXES, strict=True)]
    with LocalEngine(base, two_adapters(base.model)) as engine:
        wanted = [answer.tokens for answer in engine.generate(requests)]
    tight = tiny_base()
    token_bytes = require_exact(tight.model)
    with LocalEngine(tight, two_adapters(tight.model), kv_bytes=60 * token_bytes) as engine:
        assert [answer.tokens for answer in engine.generate(requests)] == wanted
        assert engine.cache.size_bytes <= 60 * token_bytes
        with pytest.raises(TooLong, match="of keys and values"):
            engine.generate([greedy("the cat", max_tokens=61)])
        with pytest.raises(TooLong, match="of keys and values"):
            engine.score([Request((9,) * 50)], ["the other hand " * 2])


def test_penalties_answer_as_transformers_does_beside_neighbours_without_them(engine, base):
    adapters = {adapter.name: adapter for adapter in two_adapters(base.model)}
    model = folded(tiny_base().model, MIXES[2], adapters)
    ids = torch.tensor([base.tokenizer("the cat")["input_ids"]])
    output = model.generate(ids, max_new_tokens=20, do_sample=False, repetition_penalty=1.4)
    wanted = tuple(output[0, ids.shape[1] :].tolist())
    plain, penalised, again = engine.generate(
        [greedy("the cat", MIXES[2], repetition_penalty=p) for p in (None, 1.4, None)]
    )
    assert penalised.tokens == wanted
    assert plain.tokens == again.tokens != wanted


def test_log_probabilities_are_those_of_scoring_and_come_with_the_stream(engine, base):
    request = greedy("the cat", MIXES[2], logprobs=2, logit_bias={5: 50.0}, max_tokens=4)
    answer = engine.generate([request])[0]
    assert answer.tokens == (5, 5, 5, 5)  # the bias decides, the model's own opinion is reported
    assert [entry.token for entry in answer.logprobs] == list(answer.tokens)
    assert all(len(entry.top) == 2 for entry in answer.logprobs)
    prompt = base.tokenizer("the cat")["input_ids"]
    text = base.tokenizer.decode([5])
    told = engine.score([Request((*prompt, 5, 5), MIXES[2])], [text])[0]
    assert answer.logprobs[2].value == pytest.approx(told, rel=1e-4)

    async def streamed():
        return [entry async for chunk in engine.stream(request) for entry in chunk.logprobs]

    assert [entry.token for entry in asyncio.run(streamed())] == list(answer.tokens)
    assert engine.generate([greedy("the cat")])[0].logprobs == ()


@pytest.mark.parametrize(
    ("request_", "error", "message"),
    [
        (greedy(""), BadRequest, "prompt is empty"),
        (greedy("half a \ud83d"), BadRequest, "Character 7 .* lone surrogate"),
        (greedy((Message("user", "\udc00"),)), BadRequest, "Character 0 .* lone surrogate"),
        (greedy(()), BadRequest, "at least one message"),
        (greedy((5, 999)), BadRequest, "not among 0 to 267"),
        (greedy((-1,)), BadRequest, "not among 0 to 267"),
        (greedy("the", logit_bias={268: 1}), BadRequest, "of logit_bias is not among 0 to 267"),
        (greedy("the", max_tokens=128), TooLong, "has 1 tokens and up to 128 are to follow"),
        (greedy("x" * 200), TooLong, "holds 128 together"),
        (greedy("the", Mix({"aa": 1})), UnknownAdapter, "Did you mean 'a'"),
    ],
)
def test_what_cannot_be_answered_is_refused_before_anything_is_begun(
    engine, request_, error, message
):
    for _ in range(2):
        with pytest.raises(error, match=message):
            engine.generate([greedy("the"), request_])
        with pytest.raises(error, match=message):
            asyncio.run(texts(engine, request_))
    assert len(engine.cache) == 0


def test_the_whole_context_can_be_used(engine):
    assert engine.generate([greedy((9,) * 27, max_tokens=101)])[0].num_tokens == 101


def test_scores_sum_over_continuations_and_refuse_nothing_to_score(engine):
    parts = engine.score([Request("the cat"), Request("the cat in")], [" in", " on"])
    whole = engine.score([Request("the cat")], [" in on"])[0]
    assert sum(parts) == pytest.approx(whole, rel=1e-5)
    with pytest.raises(BadRequest, match="no tokens"):
        engine.score([Request("the cat")], [""])
    with pytest.raises(BadRequest, match="1 requests and 2 continuations"):
        engine.score([Request("the cat")], ["a", "b"])
    with pytest.raises(TooLong):
        engine.score([Request("the cat")], ["x" * 200])


def test_a_scored_text_keeps_its_own_tokens(engine, base):
    """'th' + 'e' is one token in one piece: then the continuation is cut by itself."""
    th, e, the = (base.tokenizer(text)["input_ids"] for text in ("th", "e", "the"))
    assert th + e != the
    joined = engine.score([Request(tuple(th))], ["e"])
    assert engine.score([Request("th")], ["e"]) == joined


def test_a_long_prompt_does_not_hold_up_who_is_answering(base):
    async def race(engine):
        order = []

        async def one(name, request):
            async for chunk in engine.stream(request):
                order.extend([name] * chunk.num_tokens)

        await asyncio.gather(
            one("short", greedy("the", max_tokens=20)),
            one("long", greedy((7,) * 120, max_tokens=2)),
        )
        return order

    with LocalEngine(base, max_batch=4, step_tokens=8) as engine:
        order = asyncio.run(race(engine))
    assert order.index("long") > 8


def test_a_prompt_of_several_steps_is_answered_as_in_one(base):
    request = greedy("the cat in " * 8, Mix({"a": 0.5}), max_tokens=5)
    answers = []
    for step_tokens in (8, 512):
        with LocalEngine(
            base, two_adapters(base.model), max_batch=2, step_tokens=step_tokens
        ) as engine:
            answers += engine.generate([request])
    assert answers[0].tokens == answers[1].tokens


def test_more_requests_than_the_batch_and_the_queue_hold_are_all_answered_in_order(base):
    requests = [greedy((5 + n,), max_tokens=3) for n in range(30)]
    with LocalEngine(base) as engine:
        wanted = [engine.generate([request])[0].tokens for request in requests]
    with LocalEngine(base, max_batch=3, max_queue=2) as engine:
        assert [answer.tokens for answer in engine.generate(requests)] == wanted


@contextlib.contextmanager
def brake(base, steps):
    """Holds the model before a later step than these, until the block ends or it is released."""
    calls, released = itertools.count(), threading.Event()

    def hold(module, inputs):
        if next(calls) >= steps:
            assert released.wait(30)

    hook = base.model.model.layers[0].register_forward_pre_hook(hold)
    try:
        yield released.set
    finally:
        released.set()
        hook.remove()


def test_a_full_queue_is_busy_and_recovers(base):
    async def crowd(engine):
        streams = [engine.stream(greedy("the", max_tokens=50)) for _ in range(3)]
        with brake(base, steps=3) as release:
            await anext(streams[0])
            waiting = asyncio.ensure_future(anext(streams[1]))
            await asyncio.sleep(0)
            with pytest.raises(Busy, match="queue is full"):
                await anext(streams[2])
            release()
            await streams[0].aclose()
            assert (await waiting).text
            await streams[1].aclose()

    with LocalEngine(base, max_batch=1, max_queue=1) as engine:
        asyncio.run(crowd(engine))
        assert engine.generate([greedy("the", max_tokens=2)])[0].num_tokens == 2


@pytest.mark.parametrize(
    ("request_", "is_aside"),
    [
        (greedy("the cat"), False),
        (greedy("the " * 2000), True),
        (greedy((3,) * 5000), True),
        (greedy((Message("user", "the " * 2000),)), True),
        (greedy("the cat", schema='{"type": "null"}'), True),
    ],
)
def test_what_takes_long_to_read_does_not_hold_up_the_event_loop(
    engine, monkeypatch, request_, is_aside
):
    readers = []
    write = engine._jobs.written

    def written(*arguments):
        readers.append(threading.current_thread())
        return write(*arguments)

    monkeypatch.setattr(engine._jobs, "written", written)
    with contextlib.suppress(TooLong):
        asyncio.run(texts(engine, request_))
    assert [reader is not threading.main_thread() for reader in readers] == [is_aside]


def test_a_shorter_context_than_the_base_holds_is_kept_to(base):
    with LocalEngine(base, context=12) as engine:
        answer = engine.generate([greedy("the cat", max_tokens=4)])[0]
        room = 12 - answer.num_prompt_tokens
        open_end = Request("the cat", sampling=Sampling(temperature=0, max_tokens=50, fit=True))
        assert len(engine.generate([open_end])[0].tokens) <= room
        assert engine.generate([greedy("the cat", max_tokens=room)])
        with pytest.raises(TooLong, match="holds 12 together"):
            engine.generate([greedy("the cat", max_tokens=room + 1)])
    for bad in (0, 1, 129, 2.5):
        with pytest.raises(EngineError, match="expected 2 to 128, what this base holds"):
            LocalEngine(base, context=bad)


def test_closing_a_stream_frees_its_request_at_once(engine, base):
    async def leave():
        stream = engine.stream(greedy("the", Mix({"a": 1}), max_tokens=50))
        with brake(base, steps=3):
            await anext(stream)
            await stream.aclose()

    asyncio.run(leave())
    engine.remove("a")
    wait_until(lambda: engine._scheduler.is_idle)
    assert len(engine.cache) == 0
    wait_until(lambda: not layers_of(engine, "a@"))


def layers_of(engine, prefix):
    return [
        layer
        for layer in engine._core.mixed.layers.values()
        if any(name.startswith(prefix) for name in layer.bound)
    ]


def wait_until(claim, timeout_s=5.0):
    deadline = time.monotonic() + timeout_s
    while not claim():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.002)


def test_an_adapter_replaced_or_removed_under_a_request_does_not_change_it(base):
    mix = Mix({"a": 1})
    request = greedy("the cat", mix, max_tokens=60)
    old, new = (random_adapter(base.model, "a", seed=seed) for seed in (1, 2))
    with LocalEngine(tiny_base(), [old]) as engine:
        wanted = engine.generate([request])[0].text
    with LocalEngine(tiny_base(), [new]) as engine:
        replaced = engine.generate([request])[0].text

    async def during(engine):
        stream = engine.stream(request)
        shown = [(await anext(stream)).text]
        engine.add(new)
        after = asyncio.ensure_future(texts(engine, request))
        await asyncio.sleep(0)
        engine.remove("a")
        shown += [chunk.text async for chunk in stream]
        return "".join(shown), "".join(await after)

    with LocalEngine(base, [old]) as engine:
        assert asyncio.run(during(engine)) == (wanted, replaced)
        assert engine.adapters == ()
        with pytest.raises(UnknownAdapter):
            engine.generate([request])
        wait_until(lambda: not engine._core.mixed.digests)


def test_adding_the_same_content_again_keeps_the_cache(engine, base):
    request = greedy("the cat", Mix({"a": 1}))
    engine.generate([request])
    engine.add(random_adapter(tiny_model(), "a", rank=3, seed=1))
    assert engine.generate([request])[0].num_cached_tokens > 0


def test_an_adapter_that_does_not_fit_is_refused_and_nothing_changes(engine):
    stranger = random_adapter(tiny_model("gpt2"), "stranger")
    with pytest.raises(BaseMismatch, match="'stranger'"):
        engine.add(stranger)
    assert engine.adapters == ("a", "b")
    assert engine.generate([greedy("the")])[0].text
    with pytest.raises(UnknownAdapter):
        engine.remove("stranger")
    with pytest.raises(BaseMismatch):
        LocalEngine(tiny_base(), [stranger])


def test_an_adapter_trained_on_other_weights_is_refused(engine, base):
    adapter = random_adapter(base.model, "c")
    card = replace(adapter.card, base="other", base_fingerprint="0" * 16)
    with pytest.raises(BaseMismatch, match="trained on other with fingerprint 0000"):
        engine.add(replace(adapter, card=card))
    engine.add(replace(adapter, card=replace(card, base_fingerprint=base.fingerprint)))
    assert engine.adapters == ("a", "b", "c")


def test_a_crash_in_a_step_fails_its_requests_and_the_engine_goes_on(engine, base):
    wanted = engine.generate([greedy("the cat", MIXES[2])])[0].tokens
    trap = {"armed": True}

    def crash(module, inputs):
        if trap.pop("armed", False):
            raise RuntimeError("no memory")

    hook = base.model.model.layers[1].register_forward_pre_hook(crash)
    with pytest.raises(
        EngineError, match=r"failed with RuntimeError\('no memory'\); send it again"
    ):
        engine.generate([greedy("in"), greedy("on")])
    hook.remove()
    assert engine._scheduler.is_idle
    assert engine.generate([greedy("the cat", MIXES[2])])[0].tokens == wanted


def test_a_request_that_cannot_be_read_fails_alone(engine, monkeypatch):
    def broken(self, logits):
        raise ValueError("not a number")

    monkeypatch.setattr("loramix.engine.sampler.Sampler.probabilities", broken)

    async def both():
        sampled = Request("the", sampling=Sampling(temperature=1, max_tokens=30))
        results = await asyncio.gather(
            texts(engine, sampled), texts(engine, greedy("the")), return_exceptions=True
        )
        assert isinstance(results[0], EngineError)
        assert "".join(results[1])

    asyncio.run(both())


def test_two_engines_work_side_by_side(base):
    other = tiny_base("gpt2")
    requests = [greedy(prompt, MIXES[2]) for prompt in PROMPTS]
    answers = [[], []]

    def run(engine, kept):
        kept += [engine.generate([request])[0].tokens for request in requests]

    one = LocalEngine(base, two_adapters(base.model))
    two = LocalEngine(other, two_adapters(other.model), reuse=False)
    with one, two:
        wanted = [[answer.tokens for answer in engine.generate(requests)] for engine in (one, two)]
        pairs = zip((one, two), answers, strict=True)
        threads = [threading.Thread(target=run, args=pair) for pair in pairs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert answers == wanted
    assert wanted[0] != wanted[1]


def test_closing_ends_the_thread_fails_what_runs_and_gives_the_model_back(base):
    before = {name: type(module) for name, module in base.model.named_modules()}
    ids = torch.tensor([[5, 6, 7]])
    plain = base.model(ids).logits
    threads = num_engine_threads()
    engine = LocalEngine(base, two_adapters(base.model))

    async def cut():
        stream = engine.stream(greedy("the", max_tokens=50))
        with brake(base, steps=3) as release:
            await anext(stream)
            threading.Timer(0.05, release).start()  # while `close` waits for the step to end
            engine.close()
        with pytest.raises(EngineError, match="closed"):
            async for _ in stream:
                pass

    asyncio.run(cut())
    engine.close()
    assert num_engine_threads() == threads
    assert {name: type(module) for name, module in base.model.named_modules()} == before
    assert torch.equal(base.model(ids).logits, plain)
    with pytest.raises(EngineError, match="closed"):
        engine.generate([greedy("the")])
    with LocalEngine(base, two_adapters(base.model)) as again:
        assert again.generate([greedy("the", Mix({"a": 1}))])[0].text


def test_an_engine_that_is_dropped_leaves_no_thread(base):
    threads = num_engine_threads()
    engine = LocalEngine(base)
    assert num_engine_threads() == threads + 1
    del engine
    wait_until(lambda: num_engine_threads() == threads)


def num_engine_threads():
    return sum(thread.name == "loramix-engine" for thread in threading.enumerate())


def test_the_model_is_as_it_was_between_steps(engine, base):
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(base.model(ids).logits, tiny_model()(ids).logits)
    engine.generate([greedy("the", Mix({"a": 1}))])
    assert torch.equal(base.model(ids).logits, tiny_model()(ids).logits)


def shelf_of(model, folder, names="abc"):
    for seed, name in enumerate(names):
        peft.write(random_adapter(model, name, rank=2, seed=seed), folder / name)
    return Library(folder)


def test_adapters_are_read_when_a_mix_names_them_and_leave_when_others_need_the_room(
    base, tmp_path
):
    library = shelf_of(base.model, tmp_path)
    size = size_bytes(library.load("a").pairs.values())
    requests = [greedy("the cat", Mix.parse(mix)) for mix in ("a", "b+c", "c", "a:0.5", "b")]
    with LocalEngine(tiny_base(), [library.load(name) for name in "abc"]) as engine:
        wanted = [answer.tokens for answer in engine.generate(requests)]
    with LocalEngine(base, library=library, adapter_bytes=2 * size) as engine:
        assert engine.adapters == ()
        assert [answer.tokens for answer in engine.generate(requests)] == wanted
        for request, tokens in zip(requests, wanted, strict=True):
            assert engine.generate([request])[0].tokens == tokens
            assert set(request.mix) <= set(engine.adapters)
        assert engine.adapters == ("a", "b")
        assert "".join(asyncio.run(texts(engine, requests[2])))
        assert "c" in engine.adapters
        wait_until(lambda: len(engine._core.mixed.digests) == 2)
        with pytest.raises(UnknownAdapter, match="Did you mean 'a'"):
            engine.generate([greedy("the", Mix.parse("aa"))])
        with pytest.raises(AdapterError, match=f"beside {2 * size:,} of the same mix"):
            engine.generate([greedy("the", Mix.parse("a+b+c"))])


def test_given_adapters_stay_and_one_at_work_makes_others_wait(base, tmp_path):
    library = shelf_of(base.model, tmp_path)
    given = random_adapter(base.model, "given", rank=2)
    size = size_bytes(given.pairs.values())
    base.model.generation_config.eos_token_id = None  # no answer may end before it is given up

    async def crowd(engine):
        stream = engine.stream(greedy("the", Mix.parse("b"), max_tokens=50))
        with brake(base, steps=3):
            await anext(stream)
            with pytest.raises(Busy, match="No room for 'c'"):
                await anext(engine.stream(greedy("the", Mix.parse("c"))))
            await stream.aclose()
        await asyncio.to_thread(wait_until, lambda: engine._scheduler.is_idle)
        return [text async for text in engine.stream(greedy("the", Mix.parse("c")))]

    with LocalEngine(base, [given], library, adapter_bytes=2 * size) as engine:
        assert asyncio.run(crowd(engine))
        assert engine.adapters == ("c", "given")
        with pytest.raises(AdapterError, match=f"beside 0 of the same mix and {size:,} that stay"):
            engine.add(random_adapter(base.model, "large", rank=20))
        for ask in (engine.generate, lambda r: asyncio.run(texts(engine, r[0]))):
            with pytest.raises(AdapterError, match=f"beside {size:,} of the same mix"):
                ask([greedy("the", Mix.parse("b+c"))])
        mixes = [Mix.parse(name) for name in ("given", "a", "given", "b")]
        assert len(engine.generate([greedy("the", mix) for mix in mixes])) == 4


class SlowShelf:
    """A library that holds on before it gives this adapter."""

    def __init__(self, library, name):
        self.library, self.name = library, name
        self.asked, self.go = threading.Event(), threading.Event()

    def names(self):
        return self.library.names()

    def load(self, name):
        if name == self.name:
            self.asked.set()
            assert self.go.wait(30)
        return self.library.load(name)


def test_an_adapter_removed_while_its_neighbour_is_read_is_still_that_requests(base, tmp_path):
    shelf = SlowShelf(shelf_of(base.model, tmp_path), "b")
    request = Request("the cat", Mix.parse("a+b"))
    with LocalEngine(tiny_base(), [shelf.library.load(name) for name in "ab"]) as engine:
        wanted = engine.score([request, Request("the cat", Mix.parse("a"))], [" in", " in"])
    with LocalEngine(base, library=shelf) as engine:
        engine.score([Request("the", Mix.parse("a"))], [" in"])
        found = []
        thread = threading.Thread(target=lambda: found.extend(engine.score([request], [" in"])))
        thread.start()
        assert shelf.asked.wait(30)
        engine.remove("a")
        shelf.go.set()
        thread.join()
        assert found == pytest.approx(wanted[:1], rel=1e-5)
        assert engine.adapters == ("b",)
        again = engine.score([Request("the cat", Mix.parse("a"))], [" in"])
        assert again == pytest.approx(wanted[1:], rel=1e-5)
        engine.remove("a")
        wait_until(lambda: len(engine._core.mixed.digests) == 1)


def test_a_stream_given_up_while_its_adapter_is_read_leaves_nothing_held(base, tmp_path):
    shelf = SlowShelf(shelf_of(base.model, tmp_path), "b")

    async def give_up(engine):
        waiting = asyncio.ensure_future(texts(engine, greedy("the", Mix.parse("b"))))
        await asyncio.to_thread(shelf.asked.wait, 30)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        shelf.go.set()

    size = size_bytes(shelf.library.load("a").pairs.values())
    with LocalEngine(base, library=shelf, adapter_bytes=size) as engine:
        asyncio.run(give_up(engine))
        assert engine.generate([greedy("the", Mix.parse("c"), max_tokens=2)])[0].num_tokens == 2


def test_without_memory_for_a_prefix_it_is_computed_again(engine, monkeypatch):
    wanted = engine.generate([greedy("the cat")])[0].tokens

    def no_memory(*args):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(engine.cache, "longest", no_memory)
    answer = engine.generate([greedy("the cat")])[0]
    assert (answer.tokens, answer.num_cached_tokens) == (wanted, 0)


def test_an_adapted_output_layer_answers_as_folded_weights_do_beside_others(base):
    shapes = linear_shapes(base.model)["lm_head"]
    adapter = random_adapter(base.model, "head", rank=2)
    head = Pair(torch.randn(2, shapes[1]) * 0.1, torch.randn(shapes[0], 2))
    adapter = replace(adapter, pairs={**adapter.pairs, "lm_head": head})
    mixes = [Mix(), Mix.parse("head:0.7"), Mix()]
    longer = "on the other hand we see a thing that is longer"
    wanted = []
    for prompt, mix in zip(("the", longer, "a"), mixes, strict=True):
        ids = torch.tensor([base.tokenizer(prompt)["input_ids"]])
        model = folded(base.model, mix, {"head": adapter})
        output = model.generate(ids, max_new_tokens=10, do_sample=False)
        wanted.append(tuple(output[0, ids.shape[1] :].tolist()))
    with LocalEngine(base, [adapter]) as engine:
        requests = [
            greedy(prompt, mix, max_tokens=10)
            for prompt, mix in zip(("the", longer, "a"), mixes, strict=True)
        ]
        assert [answer.tokens for answer in engine.generate(requests)] == wanted


def test_several_answers_share_their_prompt_and_nothing_else(base):
    mix = Mix({"a": 0.5, "b": 0.5})
    drawn = Sampling(temperature=1.5, max_tokens=12, seed=7)
    one = Request("on the other hand", mix, drawn)
    with LocalEngine(base, two_adapters(base.model), max_batch=3, reuse=False) as engine:
        (alone,) = engine.generate([one])
        answers = engine.generate([replace(one, n=5), greedy("the cat")])
        again = engine.generate([replace(one, n=5)])
    assert [answer.index for answer in answers] == [0, 1, 2, 3, 4, 0]
    assert answers[0].tokens == alone.tokens
    assert len({answer.tokens for answer in answers[:5]}) == 5
    assert [answer.tokens for answer in again] == [answer.tokens for answer in answers[:5]]
    num_prompt = alone.num_prompt_tokens
    assert [a.num_cached_tokens for a in answers[:3]] == [0, num_prompt - 1, num_prompt - 1]


def test_one_token_of_each_of_several_answers_still_computes_the_prompt_once(base):
    many = Request("on the other hand", sampling=Sampling(temperature=1, max_tokens=1), n=4)
    with LocalEngine(base, reuse=False) as engine:
        answers = engine.generate([many])
    num_prompt = answers[0].num_prompt_tokens
    assert [a.num_cached_tokens for a in answers] == [0, *[num_prompt - 1] * 3]


def test_greedy_answers_are_equal_even_when_the_first_is_given_up(base):
    many = replace(greedy("the cat in a thing", Mix({"a": 1}), max_tokens=30), n=3)

    async def first_words(engine):
        stream = engine.stream(many)
        async for _ in stream:
            break
        await stream.aclose()

    with LocalEngine(base, two_adapters(base.model), step_tokens=2) as engine:
        asyncio.run(first_words(engine))
        (alone,) = engine.generate([replace(many, n=1)])
        assert {answer.text for answer in engine.generate([many])} == {alone.text}


def test_a_stream_of_several_answers_says_which_is_which(engine):
    many = replace(greedy("the cat", Mix({"a": 1})), n=3)

    async def collect():
        found = {}
        async for chunk in engine.stream(many):
            found.setdefault(chunk.index, []).append(chunk)
        return found

    found = asyncio.run(collect())
    expected = [answer.text for answer in engine.generate([many])]
    assert ["".join(c.text for c in found[n]) for n in range(3)] == expected
    assert all(chunks[-1].finish for chunks in found.values())


@pytest.mark.parametrize("change", [{"n": 0}, {"n": 2.0}, {"n": 1000}, {"history": "some"}])
def test_requests_that_mean_nothing_are_refused(change):
    with pytest.raises(BadRequest, match="expected"):
        Request("the cat", **change)


def changed_midway(first, second, switch, prompt, steps):
    """Greedy tokens when the second model goes on over the first's keys and values."""
    with torch.inference_mode():
        seen = first(torch.tensor([prompt[:switch]]), use_cache=True).past_key_values
        ids, found = torch.tensor([prompt[switch:]]), []
        for _ in range(steps):
            output = second(ids, past_key_values=seen, use_cache=True)
            found.append(int(output.logits[0, -1].argmax()))
            ids = torch.tensor([[found[-1]]])
    return tuple(found)


def test_a_kept_history_is_continued_under_the_new_mix_and_never_taken_for_exact(base):
    adapters = {adapter.name: adapter for adapter in two_adapters(base.model)}
    before, after = Mix({"a": 1}), Mix({"a": -0.5, "b": 1.5})
    first, second = (folded(tiny_model(), mix, adapters) for mix in (before, after))
    start = tuple(range(20, 34))
    with LocalEngine(base, adapters.values()) as engine:
        (turn,) = engine.generate([greedy(start, before, max_tokens=9)])
        asked = (*start, *turn.tokens, 40, 41, 42)
        switch = len(start) + len(turn.tokens) - 1  # its last token was never computed
        keeping = replace(greedy(asked, after, max_tokens=12), history="keep")
        (kept,) = engine.generate([keeping])
        assert kept.num_kept_tokens == kept.num_cached_tokens == switch
        assert kept.tokens == changed_midway(first, second, switch, asked, len(kept.tokens))

        (exact,) = engine.generate([greedy(asked, after, max_tokens=12)])
        assert (exact.num_cached_tokens, exact.num_kept_tokens) == (0, 0)
        assert exact.tokens != kept.tokens

        longer = (*asked, *kept.tokens, 43)
        (next_turn,) = engine.generate([replace(keeping, prompt=longer)])
        assert next_turn.num_kept_tokens == len(asked) + len(kept.tokens) - 1
        other = (*start[:10], 50, 51)  # begins alike, but is another conversation
        (stranger,) = engine.generate([replace(keeping, prompt=other)])
        assert stranger.num_kept_tokens == 0


def test_a_set_of_adapters_stays_side_by_side_while_the_batch_changes_within_it(base):
    adapters = [random_adapter(base.model, name, rank=2, seed=n) for n, name in enumerate("abcd")]
    with LocalEngine(base, adapters) as engine:
        mixed = engine._core.mixed
        engine.generate([greedy("the cat", Mix({name: 1})) for name in "abc"])
        (three,) = mixed.sets._ready
        engine.generate([greedy("in", Mix({name: 0.5})) for name in "ab"])
        assert mixed.sets._ready == [three]  # the set of three has these two
        engine.generate([greedy("in", Mix({"d": 1}))])
        assert mixed.sets._ready[-1] == (engine._loaded._residents.hold("d").bound,)
        engine.remove("a")
        engine.generate([greedy("in", Mix({"b": 1}))])
        assert three not in mixed.sets._ready
        for name in "bcd":
            engine.generate([greedy("in", Mix({name: 1, "b": 0.1}))])
        kept = {len(layer.siblings._blocks) for layer in mixed.layers.values()}
        assert max(kept) <= 4 + 1  # the step's own


def partial(model, name, targets, seed, dtype=torch.float32):
    """An adapter that acts on some layers only."""
    whole = random_adapter(model, name, rank=3, seed=seed)
    pairs = {k: p.to(dtype) for k, p in whole.pairs.items() if k.endswith(targets)}
    return replace(whole, pairs=pairs, digest=peft.digest(pairs))


@pytest.mark.parametrize("count", [1, 3])
def test_in_bfloat16_adapters_of_different_layers_and_precisions_meet(count):
    base = tiny_base()
    base.model.to(torch.bfloat16)
    adapters = [
        partial(base.model, "qv", ("q_proj", "v_proj"), 1),
        partial(base.model, "k", ("k_proj",), 2),
        partial(base.model, "half", ("q_proj", "down_proj"), 3, torch.float16),
    ]
    with LocalEngine(base, adapters[:2]) as engine:
        engine.add(adapters[2], aligned=False)
        for mix in (Mix({"qv": 1}), Mix({"k": 1}), Mix({"half": 1}), Mix({"qv": 0.5, "k": -1})):
            answers = engine.generate([greedy("the cat", mix)] * count)
            assert all(answer.tokens for answer in answers)


def test_adapters_that_come_and_go_leave_nothing_beside_those_that_stay(base):
    stays = random_adapter(base.model, "stays", rank=2, seed=1)
    with LocalEngine(base, [stays]) as engine:
        for n in range(9):
            engine.add(partial(base.model, f"t{n}", ("q_proj",), n))
            engine.generate([greedy("in", Mix({"stays": 1, f"t{n}": 1}), max_tokens=2)])
            engine.remove(f"t{n}")
        engine.generate([greedy("in", Mix({"stays": 1}), max_tokens=2)])
        layers = engine._core.mixed.layers.values()
        assert max(len(layer.siblings._blocks) for layer in layers) <= 2


def test_a_long_list_holds_no_more_keys_and_values_than_the_budget(base, monkeypatch):
    kept, submit = [], LocalEngine._submit
    monkeypatch.setattr(
        LocalEngine,
        "_submit",
        lambda self, ready, done: (kept.extend(ready), submit(self, ready, done)),
    )
    with LocalEngine(base, max_batch=2, kv_bytes=200_000, reuse=False) as engine:
        engine.generate([greedy("the cat in a thing", max_tokens=5)] * 20)
    assert len(kept) == 20
    assert sum(task.history.size_bytes for task in kept) == 0


def test_a_second_engine_on_a_served_base_is_refused_and_a_count_of_threads_checked():
    base = tiny_base()
    base.model.to(torch.bfloat16)
    with LocalEngine(base), pytest.raises(EngineError):
        LocalEngine(base)
    with pytest.raises(EngineError, match="at least 1"):
        LocalEngine(base, num_threads=-1)


def test_a_task_given_up_before_it_is_taken_is_not_run(engine, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    room = engine._scheduler.room._value
    with monkeypatch.context() as patch:
        patch.setattr("loramix.engine.core.rest", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.generate([greedy("the cat")])
    assert engine._scheduler.room._value == room
    assert engine.generate([greedy("the cat")])[0].tokens


@pytest.mark.parametrize("change", [{"n": 2}, {"history": "keep"}])
def test_a_score_is_one_and_exact(engine, change):
    with pytest.raises(BadRequest, match="exact"):
        engine.score([replace(greedy("the cat"), **change)], ["in"])


@pytest.mark.parametrize("step_tokens", [4, 512])
def test_a_prompts_own_tokens_have_log_probabilities_too(step_tokens):
    base = tiny_base()
    prompt = tuple(base.tokenizer("the cat sat on a hat")["input_ids"])
    sampling = Sampling(temperature=0, max_tokens=3, prompt_logprobs=2)
    with LocalEngine(
        base, two_adapters(base.model), step_tokens=step_tokens, max_batch=4
    ) as engine:
        engine.generate([greedy(prompt, MIXES[2])])  # the cache must not swallow any of them
        answers = engine.generate([Request(prompt, MIXES[2], sampling, n=2)])
        chunks = asyncio.run(collected(engine, Request(prompt, MIXES[2], sampling)))
        cut = len(prompt) // 2
        rest = base.tokenizer.decode(prompt[cut:])
        score = engine.score([Request(prompt[:cut], MIXES[2])], [rest])[0]
    for answer in answers:
        first, *others = answer.prompt_logprobs
        assert (first.token, first.top, math.isnan(first.value)) == (prompt[0], (), True)
        assert [p.token for p in others] == list(prompt[1:])
        assert all(p.top[0][1] >= p.value - 1e-5 for p in others)
        assert sum(p.value for p in others[cut - 1 :]) == pytest.approx(score, 1e-4)
    assert chunks[0].prompt_logprobs == answers[0].prompt_logprobs
    assert not any(chunk.prompt_logprobs for chunk in chunks[1:])


async def collected(engine, request):
    return [chunk async for chunk in engine.stream(request)]


def test_statistics_tell_what_runs_and_what_was_reused(engine):
    async def watched():
        stream = engine.stream(greedy("the cat", MIXES[2], max_tokens=60))
        await anext(stream)
        during = engine.statistics()
        async for _ in stream:
            pass
        return during

    during = asyncio.run(watched())
    engine.generate([greedy("the cat", MIXES[2])])
    after = engine.statistics()
    assert during.running == (MIXES[2],)
    assert after.running == after.waiting == ()
    assert after.adapters == ("a", "b")
    assert 0 < after.num_cached_tokens < after.num_prompt_tokens
    assert 0 < after.kv_used_bytes < after.kv_limit_bytes
    assert after.num_steps >= 60


def test_an_answer_may_be_as_long_as_fits(engine):
    prompt = "the cat " * 5
    fitted = greedy(prompt, max_tokens=1000, fit=True)
    with pytest.raises(TooLong):
        engine.generate([greedy(prompt, max_tokens=1000)])
    answer = engine.generate([fitted])[0]
    assert answer.finish == "stop" or answer.num_prompt_tokens + answer.num_tokens == 128
    with pytest.raises(TooLong):
        engine.generate([greedy("the cat " * 100, fit=True)])
