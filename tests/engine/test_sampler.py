"""Sampling draws from the distribution that its settings describe."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    GenerationConfig,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from loramix.engine import Sampling
from loramix.engine.sampler import Sampler, end_tokens, logprob
from loramix.errors import BadRequest

GREEDY = GenerationConfig()
LOGITS = torch.randn(50, generator=torch.Generator().manual_seed(0)) * 3


@given(st.floats(0.1, 5), st.floats(0.05, 1), st.integers(1, 60), st.floats(0, 1))
def test_the_distribution_is_that_of_transformers(temperature, top_p, top_k, min_p):
    sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p)
    scores = LOGITS[None]
    for warper in (
        TemperatureLogitsWarper(temperature),
        TopKLogitsWarper(top_k),
        TopPLogitsWarper(top_p),
        MinPLogitsWarper(min_p),
    ):
        scores = warper(None, scores)
    probabilities = Sampler(sampling, GREEDY).probabilities(LOGITS)
    torch.testing.assert_close(probabilities / probabilities.sum(), scores[0].softmax(-1))


@given(
    penalty=st.floats(0.5, 3),
    bias=st.dictionaries(st.integers(0, 49), st.floats(-5, 5, width=32), max_size=3),
    tokens=st.lists(st.integers(0, 49), min_size=1, max_size=8),
)
def test_repetition_and_bias_are_those_of_transformers(penalty, bias, tokens):
    prompt, said = tokens[:3], tokens[3:]
    sampling = Sampling(temperature=0, repetition_penalty=penalty, logit_bias=bias)
    sampler = Sampler(sampling, GREEDY, prompt)
    for token in said:
        forced = torch.full((50,), -1e4)
        forced[token] = 1e4
        assert sampler.pick(forced) == token
    expected = LOGITS[None]
    if bias:
        processor = SequenceBiasLogitsProcessor([[[t], float(v)] for t, v in bias.items()])
        expected = processor(torch.tensor([tokens]), expected)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([tokens]), expected)
    torch.testing.assert_close(sampler.penalised(LOGITS), expected[0])


def test_presence_and_frequency_count_the_answer_only():
    assert Sampler(Sampling(presence_penalty=1, frequency_penalty=1), GREEDY).frequency == 1
    sampling = Sampling(temperature=0, presence_penalty=0.5, frequency_penalty=0.25)
    sampler = Sampler(sampling, GREEDY, prompt=(1, 2, 3))
    logits = torch.tensor([0.0, 0.0, 0.0, 3.0])
    assert torch.equal(sampler.penalised(logits), logits)
    picked = [sampler.pick(logits) for _ in range(10)]
    assert picked[:10] == [3] * 10  # 3 - 0.5 - 9 * 0.25 is still the largest
    expected = torch.tensor([0.0, 0.0, 0.0, 3 - 0.5 - 10 * 0.25])
    torch.testing.assert_close(sampler.penalised(logits), expected)


def test_a_penalty_of_the_models_own_holds_unless_another_is_given():
    config = GenerationConfig(repetition_penalty=1.3, min_p=0.1)
    own = Sampler(Sampling(), config)
    assert (own.repetition, own.min_p) == (1.3, 0.1)
    given = Sampler(Sampling(repetition_penalty=1, min_p=0), config)
    assert (given.repetition, given.min_p) == (1.0, 0.0)


def test_log_probabilities_are_the_models():
    found = logprob(LOGITS, 7, 3)
    expected = LOGITS.log_softmax(-1)
    assert found.value == pytest.approx(float(expected[7]))
    assert [t for t, _ in found.top] == expected.topk(3).indices.tolist()
    assert logprob(LOGITS, 7, 0).top == ()
    assert len(logprob(LOGITS[:4], 1, 20).top) == 4


def test_draws_follow_the_distribution():
    sampler = Sampler(Sampling(temperature=1.0, top_k=4, seed=0), GREEDY)
    draws = torch.tensor([sampler.pick(LOGITS) for _ in range(4000)])
    shares = torch.bincount(draws, minlength=50) / 4000
    assert (shares - sampler.probabilities(LOGITS)).abs().max() < 0.03


def test_a_seed_repeats_and_no_seed_does_not():
    def draw(seed):
        sampler = Sampler(Sampling(temperature=2.0, seed=seed), GREEDY)
        return [sampler.pick(LOGITS) for _ in range(20)]

    assert draw(7) == draw(7) != draw(8)
    assert draw(None) != draw(None)


@pytest.mark.parametrize(
    ("sampling", "config", "expected"),
    [
        (Sampling(), GenerationConfig(), (0.0, 1.0, 0)),
        (Sampling(), GenerationConfig(do_sample=False), (0.0, 1.0, 0)),
        (Sampling(seed=3), GenerationConfig(do_sample=True), (1.0, 1.0, 0)),
        (
            Sampling(),
            GenerationConfig(do_sample=True, temperature=0.6, top_p=0.9, top_k=20),
            (0.6, 0.9, 20),
        ),
        (
            Sampling(temperature=0, top_p=0.5),
            GenerationConfig(do_sample=True, temperature=0.6),
            (0.0, 0.5, 0),
        ),
        (Sampling(temperature=0.3), GenerationConfig(), (0.3, 1.0, 0)),
    ],
)
def test_what_is_left_open_comes_from_the_model(sampling, config, expected):
    sampler = Sampler(sampling, config)
    assert (sampler.temperature, sampler.top_p, sampler.top_k) == expected


@pytest.mark.parametrize(("eos", "expected"), [(None, set()), (2, {2}), ([2, 5], {2, 5})])
def test_end_tokens_are_the_models_own(eos, expected):
    assert end_tokens(GenerationConfig(eos_token_id=eos)) == expected


@pytest.mark.parametrize(
    "wrong",
    [
        *({"temperature": value} for value in (-0.1, 101, math.nan)),
        *({"top_p": value} for value in (0, 1.1, math.nan)),
        *({"top_k": value} for value in (0, 2.5, True)),
        *({"max_tokens": value} for value in (0, 1.5, math.nan, math.inf, None)),
        *({"seed": value} for value in (1.5, 1 << 63, -(1 << 64))),
        *({"min_p": value} for value in (-0.1, 1.1, math.nan)),
        *({"repetition_penalty": value} for value in (0, -1, math.nan, math.inf)),
        *({"presence_penalty": value} for value in (101, math.nan)),
        *({"frequency_penalty": value} for value in (-101, math.nan)),
        *({"logit_bias": {3: value}} for value in (math.inf, math.nan, 1001, 10**400)),
        *({"logit_bias": {token: 1.0}} for token in ("5", 5.0, True)),
        *({"logprobs": value} for value in (-1, 21, 1.5, True)),
        {"stop": "text"},
    ],
)
def test_what_cannot_be_sampled_is_refused(wrong):
    with pytest.raises(BadRequest, match=next(iter(wrong))):
        Sampling(**wrong)


def test_the_coldest_temperature_is_greedy():
    cold = Sampler(Sampling(temperature=1e-40, seed=0), GREEDY)
    assert cold.pick(LOGITS) == int(LOGITS.argmax())
