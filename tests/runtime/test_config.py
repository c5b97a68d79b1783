"""Requests and engines may ask for valid values only; anything else is refused by the name of its field."""

import math
from typing import Any

import pytest

from dash_runtime.actions import Action
from dash_runtime.config import (
    EngineConfig,
    GenerationRequest,
    Mode,
    PolicyFacts,
    SamplingParameters,
    SkipOptions,
    StoppingParameters,
    find_policy,
)
from dash_runtime.errors import ConfigError, InvalidRequest


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", math.nan),
        ("temperature", -0.1),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 1e-38),
        ("repetition_penalty", math.nan),
        ("presence_penalty", 101.0),
        ("frequency_penalty", -math.inf),
    ],
)
def test_sampling_out_of_range_is_refused_by_field(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        SamplingParameters(**{name: value})
    assert refusal.value.field == f"sampling.{name}"


@pytest.mark.parametrize("temperature", [1e-45, 3e-39, 9e-6])
def test_a_temperature_that_would_divide_by_nothing_is_zero(temperature: float) -> None:
    assert SamplingParameters(temperature=temperature) == SamplingParameters()


def test_a_logit_bias_is_refused_with_its_token() -> None:
    with pytest.raises(InvalidRequest, match=r"sampling\.logit_bias\[7\]"):
        SamplingParameters(logit_bias={7: math.nan})


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"mode": Mode.ADAPTIVE, "compute_budget": 0.0}, "skip.compute_budget"),
        ({"mode": Mode.ADAPTIVE, "compute_budget": 1.01}, "skip.compute_budget"),
        ({"mode": Mode.ADAPTIVE, "compute_budget": math.nan}, "skip.compute_budget"),
        ({"mode": Mode.FULL_DEPTH, "compute_budget": 0.5}, "skip.compute_budget"),
        ({"mode": Mode.FIXED}, "skip.fixed_action"),
        ({"mode": Mode.ADAPTIVE, "fixed_action": Action.INT4}, "skip.fixed_action"),
        ({"mode": Mode.FIXED, "fixed_action": Action.INT4, "policy_name": "x"}, "skip.policy_name"),
        ({"mode": Mode.ADAPTIVE, "draft_length": 4}, "skip.draft_length"),
        ({"mode": Mode.EXACT, "draft_length": 0}, "skip.draft_length"),
    ],
)
def test_skip_options_that_do_not_fit_together_are_refused_by_field(options: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        SkipOptions(**options)
    assert refusal.value.field == field


def test_an_empty_prompt_no_new_tokens_and_too_many_logprobs_are_refused_by_field() -> None:
    with pytest.raises(InvalidRequest, match="prompt"):
        GenerationRequest("a", [], StoppingParameters(1))
    with pytest.raises(InvalidRequest, match=r"stopping\.max_new_tokens"):
        StoppingParameters(0)
    with pytest.raises(InvalidRequest, match=r"output\.logprobs"):
        GenerationRequest("a", [1], StoppingParameters(1), logprobs=21)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_slots", 0),
        ("cache_tokens", 0),
        ("prefill_chunk_tokens", -1),
        ("prefix_cache_tokens", -1),
        ("context_length", 1),
        ("default_compute_budget", 0.0),
    ],
)
def test_an_engine_that_cannot_work_is_refused_by_setting(name: str, value: Any) -> None:
    with pytest.raises(ConfigError) as refusal:
        EngineConfig(**{name: value})
    assert refusal.value.field == name


def test_each_mode_has_a_default_policy_that_was_made_for_it() -> None:
    def policy(name: str, is_drafter: bool) -> PolicyFacts:
        return PolicyFacts(name, "", True, 1, (0,), {Action.FULL: 1.0}, 0.5, 0.6, "affine", is_drafter)

    first, drafter, other = policy("first", False), policy("drafter", True), policy("other", False)
    assert find_policy((drafter, first, other), None, Mode.ADAPTIVE) is first
    assert find_policy((first, other, drafter), None, Mode.EXACT) is drafter
    assert find_policy((first, other), None, Mode.EXACT) is first
    assert find_policy((drafter,), None, Mode.ADAPTIVE) is drafter
    assert find_policy((first, other), "other", Mode.EXACT) is other
    with pytest.raises(InvalidRequest, match="known: first, other"):
        find_policy((first, other), "drafter", Mode.EXACT)


def test_a_servers_default_budget_is_adaptives_and_no_drafters() -> None:
    policy = PolicyFacts("p", "", True, 1, (0,), {Action.FULL: 1.0}, 0.5, 0.6, "affine")
    assert policy.default_budget(Mode.ADAPTIVE, 0.8) == 0.8
    assert policy.default_budget(Mode.ADAPTIVE, 0.4) == 0.5
    assert policy.default_budget(Mode.ADAPTIVE, None) == policy.default_budget(Mode.EXACT, 0.8) == 0.6
