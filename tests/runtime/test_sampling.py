"""Sampling: only allowed tokens are drawn, as often as they should be, and a seed repeats its draws."""

from collections import Counter

import numpy
import pytest
import torch

from dash_runtime.config import SamplingParameters
from dash_runtime.engine.sampling import Sampler, _first_above, token_logprobs
from dash_runtime.engine.scores import HostScores

LOGITS = torch.tensor([1.0, 3.0, 2.0, -1.0, 0.0])
PROBABILITIES = torch.softmax(LOGITS, -1)


def drawn_ids(parameters: SamplingParameters, logits: torch.Tensor = LOGITS, draws: int = 400) -> Counter[int]:
    sampler = Sampler(parameters, [])
    return Counter(sampler.sample(logits) for _ in range(draws))


def test_temperature_zero_takes_the_largest_logit() -> None:
    assert drawn_ids(SamplingParameters()) == {1: 400}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_distribution_at_the_temperature(temperature: float) -> None:
    counts = drawn_ids(SamplingParameters(temperature=temperature, seed=1), draws=6000)
    expected = torch.softmax(LOGITS / temperature, -1)
    chi_square = sum((counts[i] - 6000 * float(p)) ** 2 / (6000 * float(p)) for i, p in enumerate(expected))
    assert chi_square < 18.5  # 99.9 % quantile with four degrees of freedom


@pytest.mark.parametrize(
    "parameters",
    [
        SamplingParameters(temperature=1, seed=2),
        SamplingParameters(temperature=1, top_p=0.9, seed=2),
        SamplingParameters(temperature=0.7, top_p=0.8, seed=2),
        SamplingParameters(temperature=2, min_p=0.1, logit_bias={3: 1.0}, seed=2),
        SamplingParameters(temperature=1, top_k=70, frequency_penalty=0.3, seed=2),
    ],
)
def test_draws_of_a_large_vocabulary_follow_the_distribution(parameters: SamplingParameters) -> None:
    logits = 2 * torch.randn(5000, generator=torch.Generator().manual_seed(0))
    sampler = Sampler(parameters, [])
    expected = sampler.distribution(logits)
    assert float(expected.sum()) == pytest.approx(1)
    assert int((expected > 0).sum()) == 5000 or parameters != SamplingParameters(temperature=1, seed=2)
    counts = torch.zeros(5000)
    for _ in range(4000):
        token_id = sampler.sample(logits)
        sampler.rollback([token_id])
        counts[token_id] += 1
    assert not counts[expected == 0].any()
    groups = torch.arange(5000) % 10
    wanted, got = (torch.zeros(10).index_add_(0, groups, own) for own in (4000 * expected, counts))
    assert float(((got - wanted) ** 2 / wanted).sum()) < 27.9  # 99.9 % quantile with nine degrees of freedom


def test_no_number_takes_a_token_that_weighs_nothing() -> None:
    weights = torch.zeros(1000)
    weights[[300, 301, 700]] = torch.tensor([1e-30, 1.0, 1e-30])
    sampler = Sampler(SamplingParameters(temperature=1, seed=3), [])
    assert {sampler.draw_weighed(weights) for _ in range(500)} <= {300, 301, 700}
    for ends in ([0.0, 1.0, 1.0], [0.5, 1.0, 1.0]):
        assert _first_above(numpy.array(ends), 1.0) == 1  # which rounding may make of a number below it


@pytest.mark.parametrize(
    ("parameters", "allowed"),
    [
        (SamplingParameters(temperature=1, top_k=2), {1, 2}),
        (SamplingParameters(temperature=1, top_k=1), {1}),
        (SamplingParameters(temperature=1, top_k=99), {0, 1, 2, 3, 4}),
        (SamplingParameters(temperature=1, top_p=0.6), {1}),
        (SamplingParameters(temperature=1, top_p=0.7), {1, 2}),
        (SamplingParameters(temperature=1, top_p=1e-6), {1}),
        (SamplingParameters(temperature=1, min_p=0.2), {1, 2}),
        (SamplingParameters(temperature=1, min_p=1.0), {1}),
        (SamplingParameters(temperature=1, top_k=3, top_p=0.95, min_p=0.01), {0, 1, 2}),
    ],
)
def test_truncation_keeps_the_tokens_it_should_and_no_other(parameters: SamplingParameters, allowed: set[int]) -> None:
    assert set(drawn_ids(parameters, draws=2000)) == allowed


@pytest.mark.parametrize(
    "parameters",
    [
        SamplingParameters(temperature=1, top_p=0.5),
        SamplingParameters(temperature=1, top_p=0.999),
        SamplingParameters(temperature=1, min_p=1e-4),
        SamplingParameters(temperature=1, top_k=2000, top_p=0.9),
        SamplingParameters(temperature=1, top_k=50),
    ],
)
def test_truncation_of_a_large_vocabulary_equals_sorting_all_of_it(parameters: SamplingParameters) -> None:
    logits = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    values, ids = logits.sort(descending=True)
    if parameters.top_k:
        values, ids = values[: parameters.top_k], ids[: parameters.top_k]
    probabilities = torch.softmax(values, -1)
    kept = (probabilities.cumsum(0) - probabilities < parameters.top_p) & (
        probabilities >= parameters.min_p * probabilities[0]
    )
    _, candidates = Sampler(parameters, [])._truncate(HostScores(logits.numpy()))
    assert candidates is not None
    assert set(candidates.tolist()) == set(ids[kept].tolist())


def test_a_seed_repeats_its_draws_and_another_does_not() -> None:
    flat = torch.zeros(1000)

    def draws(seed: int) -> list[int]:
        sampler = Sampler(SamplingParameters(temperature=1, seed=seed), [])
        return [sampler.sample(flat) for _ in range(20)]

    assert draws(2**64 - 1) == draws(2**64 - 1)
    assert draws(1) != draws(2)


def test_repetition_counts_the_prompt_and_lowers_negative_logits_too() -> None:
    sampler = Sampler(SamplingParameters(repetition_penalty=2.0), [0])
    assert sampler.sample(torch.tensor([3.0, 2.0])) == 1
    negative = Sampler(SamplingParameters(repetition_penalty=2.0), [0])
    assert negative.sample(torch.tensor([-1.0, -1.5])) == 1


def test_sampling_leaves_the_logits_as_they_are() -> None:
    logits = LOGITS.clone()
    parameters = SamplingParameters(
        temperature=0.7, top_p=0.9, repetition_penalty=1.3, presence_penalty=1, logit_bias={0: 2.0}
    )
    Sampler(parameters, [1, 2]).sample(logits)
    assert torch.equal(logits, LOGITS)


def test_logprobs_are_of_the_raw_distribution_best_first() -> None:
    logprobs = token_logprobs(LOGITS, 3, 2)
    assert logprobs.chosen == pytest.approx(float(PROBABILITIES[3].log()))
    assert [token_id for token_id, _ in logprobs.top] == [1, 2]
    assert logprobs.top[0][1] == pytest.approx(float(PROBABILITIES[1].log()))
    assert token_logprobs(LOGITS, 3, 0).top == []
