"""Mode EXACT in the engine gives full depth's tokens, whatever drafts them and wherever a draft is cut short."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from dash_runtime.actions import Action, LatencyTable
from dash_runtime.config import GenerationRequest, Mode, SamplingParameters, SkipOptions, StoppingParameters
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.engine.engine import Engine
from dash_runtime.events import EngineEvent, SequenceFinished, SpeculationStatistics, TokenProduced
from dash_runtime.layers.batch import Batch, PassKind
from dash_runtime.passes import PassPlan, PassResult
from dash_runtime.policy.catalog import USUAL_VERIFICATION_COSTS
from dash_runtime.policy.draft_costs import RoundCosts
from tests.runtime.planned_engine import ACTIONS, make_engine
from tests.runtime.support import drain, finished, load_decoder, num_layer_runs, tokens

pytestmark = pytest.mark.alone

EXACT = SkipOptions(Mode.EXACT, compute_budget=0.8)
FULL = SkipOptions(Mode.FULL_DEPTH)
PROMPTS = ([1, 2, 3], list(range(40, 75)), [7, 7], list(range(9, 17)))


@pytest.fixture(scope="module")
def decoder(tiny_folder: Path) -> Decoder:
    # float32, where a row's rounding hardly depends on its neighbours
    return load_decoder(tiny_folder, torch.float32, ACTIONS)


def request(
    name: str, prompt: list[int] | None = None, max_new_tokens: int = 24, **options: object
) -> GenerationRequest:
    made = GenerationRequest(name, prompt or PROMPTS[0], StoppingParameters(max_new_tokens), skip=EXACT)
    return replace(made, **options)  # type: ignore[arg-type]


def run(engine: Engine, *requests: GenerationRequest) -> dict[str, list[EngineEvent]]:
    for own in requests:
        engine.submit(own)
    events = drain(engine)
    assert engine.num_reserved_cache_tokens == 0
    return events


def drafts(events: list[EngineEvent]) -> SpeculationStatistics:
    speculation = finished(events).speculation
    assert speculation is not None
    return speculation


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("budget", [0.6, 0.9])
def test_greedy_tokens_are_full_depths(decoder: Decoder, prompt: list[int], budget: float) -> None:
    skip = replace(EXACT, compute_budget=budget)
    events = run(make_engine(decoder), request("exact", prompt, 60, skip=skip))["exact"]
    expected = run(make_engine(decoder), request("full", prompt, 60, skip=FULL))["full"]
    assert tokens(events) == tokens(expected)
    assert drafts(events).num_drafted > 0


def test_running_a_guess_of_the_text_beside_a_drafted_token_changes_no_token(decoder: Decoder) -> None:
    # Greedy: whether a guess is free decides how long drafts are, and so which random number a token is drawn by.
    asked = request("a", [1, 2, 3, 1, 4, 5] * 3, 80)
    # Verifications so dear that the model drafts, whatever the text has.
    with_guesses, without = (
        run(make_engine(decoder, verification_costs={8: 5.0}, least_gain=0, second_row=share), asked)["a"]
        for share in (0.0, 100.0)
    )
    assert tokens(with_guesses) == tokens(without)
    assert drafts(with_guesses).num_drafted > drafts(with_guesses).num_drafted_from_text > 0
    one, other = (num_layer_runs(events) for events in (with_guesses, without))
    assert one > other  # rows of wrong guesses are counted


def test_without_the_planner_nothing_of_a_draft_depends_on_a_neighbour(decoder: Decoder) -> None:
    asked = request("a", [1, 2, 3, 1, 4, 5] * 3, 80, sampling=SamplingParameters(0.7, top_k=4, seed=5))
    neighbour = request("b", PROMPTS[1], 100, skip=FULL)
    options = {"verification_costs": {8: 5.0}, "least_gain": 0, "second_row": 0.0, "group_planner": False}
    alone, beside = (run(make_engine(decoder, **options), *own)["a"] for own in ([asked], [asked, neighbour]))
    assert tokens(alone) == tokens(beside)
    assert drafts(alone).accepted_lengths == drafts(beside).accepted_lengths
    depths = [finished(events).depth for events in (alone, beside)]
    assert depths[0].speculative_action_counts == depths[1].speculative_action_counts


def test_penalised_greedy_tokens_are_full_depths(decoder: Decoder) -> None:
    sampling = SamplingParameters(repetition_penalty=1.4, frequency_penalty=0.2, logit_bias={5: 2.0})
    events = run(make_engine(decoder), request("exact", max_new_tokens=60, sampling=sampling))["exact"]
    expected = run(make_engine(decoder), request("full", max_new_tokens=60, sampling=sampling, skip=FULL))["full"]
    assert tokens(events) == tokens(expected)


def test_drafts_of_any_length_and_other_modes_share_a_batch(decoder: Decoder) -> None:
    requests = [
        request("long", PROMPTS[0], 40),
        request("short", PROMPTS[1], 31, skip=replace(EXACT, draft_length=1)),
        request("full", PROMPTS[2], 25, skip=FULL),
        request("adaptive", PROMPTS[3], 25, skip=SkipOptions(Mode.ADAPTIVE, compute_budget=0.8)),
        request("exact", PROMPTS[3], 33, skip=replace(EXACT, compute_budget=0.6)),
    ]
    together = run(make_engine(decoder), *requests)
    for own in requests:
        alone = run(make_engine(decoder), own)[own.request_id]
        assert tokens(together[own.request_id]) == tokens(alone), own.request_id
        if own.skip.mode is Mode.EXACT:
            full_depth = run(make_engine(decoder), replace(own, skip=FULL))[own.request_id]
            assert tokens(alone) == tokens(full_depth)


def test_keys_and_values_of_accepted_tokens_are_full_depths(decoder: Decoder) -> None:
    caches = []
    for skip in (EXACT, FULL):
        engine = make_engine(decoder)
        engine.submit(request("a", max_new_tokens=60, skip=skip))
        sequence = None
        while sequence is None or len(sequence.output_ids) < 40 or sequence.is_drafting:
            engine.step()
            sequence = engine._running["a"]
        caches.append(sequence.cache)
    for exact, full in zip((*caches[0].keys, *caches[0].values), (*caches[1].keys, *caches[1].values), strict=True):
        torch.testing.assert_close(exact[:42], full[:42], atol=1e-4, rtol=1e-4)


def test_every_token_is_counted_once_and_a_run_repeats(decoder: Decoder) -> None:
    first, second = (run(make_engine(decoder), request("a", max_new_tokens=50))["a"] for _ in range(2))
    counts, again = (
        msgspec.structs.replace(drafts(events), draft_ns=0, verification_ns=0) for events in (first, second)
    )
    assert counts == again
    num_drafted, num_accepted, num_verifications = counts.num_drafted, counts.num_accepted, counts.num_verifications
    num_from_text = counts.num_drafted_from_text
    depth = finished(first).depth
    assert len(tokens(first)) == finished(first).num_output_tokens == depth.num_decode_tokens + 1 == 50
    assert 0 < num_accepted < num_drafted
    assert 0 < num_from_text < num_drafted
    assert num_accepted + num_verifications <= 49
    # Every token that the model drafted ran once, and every draft with the token before it when it was verified.
    num_plain = 49 - num_accepted - num_verifications
    assert [sum(layer) for layer in depth.layer_action_counts] == [49] * 6
    assert num_layer_runs(first) == 6 * (2 * num_drafted - num_from_text + num_verifications + num_plain)


def test_actions_and_logprobs_are_full_depths(decoder: Decoder) -> None:
    options = {"return_decisions": True, "logprobs": 3}
    exact = run(make_engine(decoder), request("a", **options))["a"]
    full = run(make_engine(decoder), request("a", skip=FULL, **options))["a"]
    for own, expected in zip(exact[1:-1], full[1:-1], strict=True):
        assert isinstance(own, TokenProduced)
        assert isinstance(expected, TokenProduced)
        assert own.plan == expected.plan == bytes([Action.FULL] * 6)
        assert own.logprobs is not None
        assert expected.logprobs is not None
        assert own.logprobs.chosen == pytest.approx(expected.logprobs.chosen, abs=1e-4)
        assert [token for token, _ in own.logprobs.top] == [token for token, _ in expected.logprobs.top]


@pytest.mark.parametrize("place", range(1, 20))
def test_a_stop_token_anywhere_in_a_draft_ends_the_output_there(decoder: Decoder, place: int) -> None:
    output = tokens(run(make_engine(decoder), request("a", skip=FULL))["a"])
    end = output[place]
    stopping = StoppingParameters(24, stop_token_ids=frozenset({end}))
    events = run(make_engine(decoder), request("a", stopping=stopping))["a"]
    assert tokens(events) == output[: output.index(end) + 1]
    assert finished(events).reason == "stop_token"
    events = run(make_engine(decoder, eos=frozenset({end})), request("a"))["a"]
    assert tokens(events) == output[: output.index(end) + 1]
    assert finished(events).reason == "end_of_sequence"
    assert drafts(events).num_accepted <= drafts(events).num_drafted


@pytest.mark.parametrize("max_new_tokens", range(1, 12))
def test_the_limit_is_reached_exactly_wherever_it_falls(decoder: Decoder, max_new_tokens: int) -> None:
    output = tokens(run(make_engine(decoder), request("a", skip=FULL))["a"])
    events = run(make_engine(decoder), request("a", max_new_tokens=max_new_tokens))["a"]
    assert tokens(events) == output[:max_new_tokens]
    assert finished(events).reason == "length"


def test_the_context_can_be_filled_to_its_last_position(decoder: Decoder) -> None:
    prompt = [place % 250 for place in range(490)]
    events = run(make_engine(decoder), request("a", prompt, 22))["a"]
    assert tokens(events) == tokens(run(make_engine(decoder), request("a", prompt, 22, skip=FULL))["a"])
    assert len(tokens(events)) == 22


def test_a_request_can_be_cancelled_or_stopped_inside_a_draft(decoder: Decoder) -> None:
    for ends in ("cancel", "stop"):
        # A verification so dear that a draft begun is worth its full length.
        engine = make_engine(decoder, verification_costs={7: 5.0}, least_gain=0)
        engine.submit(request("a", max_new_tokens=60, skip=replace(EXACT, compute_budget=0.6)))
        engine.step()
        sequence = engine._running["a"]
        assert sequence.speculation is not None
        for _ in range(3):
            engine.step()
        assert sequence.is_drafting
        assert sequence.speculation.token_ids
        if ends == "cancel":
            engine.cancel("a")
        else:
            (event,) = engine.stop("a")
            assert isinstance(event, SequenceFinished)
            assert event.num_output_tokens == len(sequence.output_ids)
        assert not engine.has_work
        assert engine.num_reserved_cache_tokens == 0


def test_a_policy_whose_draft_is_full_depth_leaves_drafting_to_the_text(decoder: Decoder) -> None:
    skip = replace(EXACT, compute_budget=1.0)
    engine = make_engine(decoder, verification_costs=USUAL_VERIFICATION_COSTS)
    events = run(engine, request("a", skip=skip))["a"]
    assert tokens(events) == tokens(run(make_engine(decoder), request("a", skip=FULL))["a"])
    counts = drafts(events)
    assert counts.num_drafted == counts.num_drafted_from_text
    assert counts.draft_ns == 0


def test_every_token_costs_one_where_no_draft_pays(decoder: Decoder) -> None:
    events = run(make_engine(decoder, verification_costs={7: 100.0}), request("a", skip=EXACT))["a"]
    assert tokens(events) == tokens(run(make_engine(decoder), request("a", skip=FULL))["a"])
    assert drafts(events).num_drafted == 0
    assert finished(events).depth.mean_cost == pytest.approx(1)


def test_drafts_are_no_longer_than_asked(decoder: Decoder) -> None:
    events = run(make_engine(decoder), request("a", max_new_tokens=60, skip=replace(EXACT, draft_length=2)))["a"]
    assert 0 < drafts(events).num_drafted <= 2 * drafts(events).num_verifications


def test_a_sampled_run_repeats_and_draws_what_it_may(decoder: Decoder) -> None:
    sampling = SamplingParameters(temperature=1.2, top_k=5, repetition_penalty=1.1, seed=11)
    own = request("a", max_new_tokens=50, sampling=sampling, logprobs=5)
    first, second = (run(make_engine(decoder), own)["a"] for _ in range(2))
    assert tokens(first) == tokens(second)
    assert drafts(first).num_accepted > 0
    alone = tokens(run(make_engine(decoder), replace(own, skip=FULL))["a"])
    assert len(alone) == len(tokens(first))


class NotingDecoder:
    """A real decoder that notes whether the rows of verifications share a head."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self.share_heads: list[bool] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)

    def run_pass(self, plan: PassPlan, token_ids: Sequence[int], batch: Batch) -> PassResult:
        if len(token_ids) > 1 and batch.kind is PassKind.VERIFY:
            self.share_heads.append(plan.shares_head)
        return self._decoder.run_pass(plan, token_ids, batch)


@pytest.mark.parametrize("group_planner", [True, False])
def test_drafts_of_one_sequence_are_scored_apart_also_where_neighbours_share_products(
    decoder: Decoder, group_planner: bool
) -> None:
    noting = NotingDecoder(decoder)
    engine = make_engine(noting, group_planner=group_planner)  # type: ignore[arg-type]
    events = run(engine, request("exact", max_new_tokens=60))["exact"]
    assert drafts(events).num_drafted > 0
    assert set(noting.share_heads) == {False}


DRAFTS_PAY = RoundCosts((LatencyTable((1, 8), {Action.FULL: (10.0, 20.0)}),), 20.0, {1: 0.3, 7: 0.4, 31: 0.5}, 64)
"""Costs by which every draft pays."""


def test_sequences_draft_in_step_and_one_pass_verifies_all(decoder: Decoder) -> None:
    noting = NotingDecoder(decoder)
    engine = make_engine(noting, round_costs=DRAFTS_PAY)  # type: ignore[arg-type]
    asked = [request(str(place), prompt, 40) for place, prompt in enumerate(PROMPTS)]
    together = run(engine, *asked)
    drafted = sum(drafts(events).num_drafted for events in together.values())
    assert drafted > 40
    assert True in noting.share_heads  # of verifications: those of several sequences
    for own in asked:
        full_depth = run(make_engine(decoder), replace(own, skip=FULL))[own.request_id]
        assert tokens(together[own.request_id]) == tokens(full_depth)
    verified = [drafts(events).num_verifications for events in together.values()]
    assert len(noting.share_heads) < sum(verified)  # of several sequences at a time


def test_sequences_come_and_go_in_the_middle_of_a_round(decoder: Decoder) -> None:
    engine = make_engine(decoder, round_costs=DRAFTS_PAY)
    expected = {
        name: tokens(run(make_engine(decoder), request(name, PROMPTS[int(name)], 30, skip=FULL))[name])
        for name in "023"
    }
    given: dict[str, list[int]] = {name: [] for name in "0123"}

    def step(count: int) -> None:
        for _ in range(count):
            for event in engine.step():
                if isinstance(event, TokenProduced):
                    given[event.request_id].append(event.token_id)

    for name in "01":
        engine.submit(request(name, PROMPTS[int(name)], 30))
    step(3)
    engine.submit(request("2", PROMPTS[2], 30))
    step(2)
    engine.cancel("1")
    engine.submit(request("3", PROMPTS[3], 30, skip=FULL))
    while engine.has_work:
        step(1)
    assert {name: given[name] for name in "023"} == expected
    assert engine.num_reserved_cache_tokens == 0
