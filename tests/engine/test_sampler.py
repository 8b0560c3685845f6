"""Sampling draws from the distribution that its settings describe."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    GenerationConfig,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from loramix.engine import Sampling
from loramix.engine.sampler import Sampler, end_tokens
from loramix.errors import BadRequest

GREEDY = GenerationConfig()
LOGITS = torch.randn(50, generator=torch.Generator().manual_seed(0)) * 3


@given(st.floats(0.1, 5), st.floats(0.05, 1), st.integers(1, 60))
def test_the_distribution_is_that_of_transformers(temperature, top_p, top_k):
    sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k)
    scores = LOGITS[None]
    for warper in (
        TemperatureLogitsWarper(temperature),
        TopKLogitsWarper(top_k),
        TopPLogitsWarper(top_p),
    ):
        scores = warper(None, scores)
    probabilities = Sampler(sampling, GREEDY).probabilities(LOGITS)
    torch.testing.assert_close(probabilities / probabilities.sum(), scores[0].softmax(-1))


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
        {"stop": "text"},
    ],
)
def test_what_cannot_be_sampled_is_refused(wrong):
    with pytest.raises(BadRequest, match=next(iter(wrong))):
        Sampling(**wrong)


def test_the_coldest_temperature_is_greedy():
    cold = Sampler(Sampling(temperature=1e-40, seed=0), GREEDY)
    assert cold.pick(LOGITS) == int(LOGITS.argmax())
