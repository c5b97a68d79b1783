"""The whole path with nothing faked: client, gRPC, server process, worker process, engine, a tiny model."""

import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import psutil
import pytest
from pydantic import BaseModel, Field

from dash_client import (
    Action,
    Audit,
    DashClient,
    GenerationOptions,
    InvalidArgumentError,
    LarkGrammar,
    NotFoundError,
    Session,
    Tool,
)
from tests.e2e.service import REPEATABLE, Service

CHAT = [{"role": "user", "content": "Hello, who are you?"}]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Iterator[Service]:
    running = Service(tmp_path_factory.mktemp("service"), tiny_folder, DASH_AUDIT_RATE="1")
    yield running
    workers = running.workers()
    assert running.stop() == 0, running.log.read_text()
    assert not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers)
    assert "Traceback" not in running.log.read_text()


def test_an_adaptive_stream_without_a_policy_runs_a_fixed_plan_within_its_budget(service: Service) -> None:
    info = service.client.policy_info()
    budget = min(1.0, info.lowest_budget + 0.1)
    with service.client.stream(
        CHAT, mode="adaptive", compute_budget=budget, max_new_tokens=40, ignore_eos=True, seed=4, return_decisions=True
    ) as stream:
        started = stream.started
        result = stream.final()
    assert info.name == "frontier"
    assert started.policy != info.name
    assert "not a learned policy" in started.policy_note
    assert len(result.token_ids) == 40
    assert result.decisions is not None
    assert result.decisions.shape == (40, 6)
    plans = [result.decisions[token] for token in range(40)]
    assert plans[0] == (started.prefill_action,) * 6
    assert len(set(plans[1:])) == 1
    assert result.depth.mean_cost is not None
    # A wrong guess takes a row more, whose cost is at most another token's.
    assert result.depth.mean_cost <= budget * (1 + result.depth.mean_speculative_layers / 6) + 1e-6


@pytest.mark.parametrize("mode", ["full_depth", "adaptive", "fixed", "exact"])
def test_counts_are_of_the_tokens_that_were_put_out(service: Service, mode: str) -> None:
    options = {"mode": mode} | ({"fixed_action": "int4"} if mode == "fixed" else {})
    answer = service.client.chat(CHAT, max_new_tokens=40, ignore_eos=True, return_decisions=True, **options)
    assert answer.decisions is not None
    plans = [answer.decisions[token] for token in range(1, 40)]
    for action in Action:
        assert answer.depth.action_counts.get(action, 0) == sum(plan.count(action) for plan in plans)
    assert sum(answer.depth.action_counts.values()) == 39 * 6
    drafts = answer.usage.speculation
    num_rejected = drafts.wasted_token_count if drafts else 0
    assert sum(answer.depth.speculative_action_counts.values()) >= 6 * num_rejected


class Person(BaseModel):
    name: str = Field(min_length=1, max_length=5, pattern="^[a-z]+$")
    age: int = Field(ge=0, le=99)


@pytest.mark.parametrize("mode", ["full_depth", "adaptive", "exact"])
def test_an_answer_keeps_to_its_constraint_and_comes_back_parsed(service: Service, mode: str) -> None:
    options = GenerationOptions(mode=mode, temperature=1.5, seed=5, max_new_tokens=80)
    with service.client.stream(CHAT, constraint=Person, **options) as stream:
        answer = stream.final()
    assert isinstance(answer.parsed, Person)
    assert answer.finish_reason == "end_of_sequence"
    assert service.client.chat(CHAT, constraint=["red", "blue"], **options).text in ("red", "blue")
    date = re.compile(r"[12]\d{3}-[01]\d-[0-3]\d")
    assert date.fullmatch(service.client.chat(CHAT, constraint=date, **options).text)
    grammar = LarkGrammar('start: "a"{2} ("b" | "c")')
    assert service.client.chat(CHAT, constraint=grammar, **options).text in ("aab", "aac")


class Weather(BaseModel):
    """Tells the weather."""

    city: str = Field(min_length=1, max_length=4, pattern="^[a-z]+$")
    days: Literal[1, 2, 3]


@pytest.mark.parametrize("mode", ["full_depth", "adaptive", "exact"])
def test_a_tool_that_has_to_be_called_is_called_by_its_schema(service: Service, mode: str) -> None:
    options: GenerationOptions = {"mode": mode, "max_new_tokens": 200, "temperature": 1.0, "seed": 5}
    tools = [Weather, Tool("clock")]
    answer = service.client.chat(CHAT, tools=tools, tool_choice="Weather", **options)
    (call,) = answer.tool_calls
    assert call.name == "Weather"
    Weather(**call.arguments)
    assert (answer.text, answer.finish_reason) == ("", "end_of_sequence")
    with service.client.chat_stream(CHAT, tools=tools, tool_choice="Weather", **options) as stream:
        streamed = [call.arguments for delta in stream for call in delta.tool_calls]
    assert streamed == [call.arguments]
    result = {"role": "tool", "tool_call_id": call.id, "name": call.name, "content": "rain"}
    assert service.client.chat([*CHAT, answer.message, result], tools=tools, tool_choice="none", **options).text
    cut = service.client.chat(CHAT, tools=tools, tool_choice="clock", mode=mode, max_new_tokens=30)
    assert (cut.text, cut.tool_calls) == ('<tool_call>\n{"name": "clock", ', ())
    assert cut.finish_reason == "length"


def test_an_answer_is_audited_against_full_depth(service: Service) -> None:
    def audit(**options: Any) -> Audit:
        answer = service.client.chat(CHAT, mode="adaptive", max_new_tokens=40, temperature=1.0, seed=3, **options)
        deadline = time.monotonic() + 20
        while True:
            try:
                return service.client.audit(answer.started.request_id)
            except NotFoundError:
                assert time.monotonic() < deadline
                time.sleep(0.02)

    whole, cheap = audit(compute_budget=1.0), audit(compute_budget=service.client.policy_info().lowest_budget)
    assert whole.token_count > 3
    # Steps and passes of many tokens round differently.
    assert whole.agreement > 0.9
    assert abs(whole.logprob_gap) < 0.05
    assert whole.divergence < cheap.divergence
    assert cheap.calibrated_divergence is not None


def test_a_constraint_that_cannot_be_kept_is_refused_by_its_place_and_the_next_one_is_served(service: Service) -> None:
    schema = {"type": "object", "properties": {"day": {"type": "dates"}}}
    for call in (service.client.chat, lambda *own, **options: service.client.chat_stream(*own, **options).final()):
        with pytest.raises(InvalidArgumentError, match="/properties/day: Invalid type: dates") as refused:
            call(CHAT, constraint=schema)
        (violation,) = refused.value.field_violations
        assert violation.field == "parameters.constraint.json_schema"
    assert service.client.chat(CHAT, constraint=["yes"]).text == "yes"


@pytest.mark.parametrize("mode", ["full_depth", "adaptive", "fixed", "exact"])
def test_an_answer_scores_what_it_had_when_it_was_generated(service: Service, mode: str) -> None:
    how: dict[str, Any] = {"mode": mode} | ({"fixed_action": "int8"} if mode == "fixed" else {})
    answer = service.client.chat(CHAT, max_new_tokens=12, ignore_eos=True, logprobs=3, **how)
    score = service.client.score(CHAT, answer.token_ids, logprobs=3, return_decisions=True, **how)
    assert answer.logprobs is not None
    assert score.token_ids == answer.token_ids
    expected = [entry.chosen for entry in answer.logprobs]
    assert [entry.chosen for entry in score.logprobs] == pytest.approx(expected, abs=0.15)
    assert score.log_probability == pytest.approx(sum(expected), abs=0.5)
    assert score.decisions is not None
    assert score.decisions.shape == (12, 6)
    assert score.usage.output_token_count == 12
    assert score.started.mode == ("full_depth" if mode == "exact" else mode)


def test_text_scores_as_its_tokens_after_the_prompts_do_and_a_prompt_scores_itself(service: Service) -> None:
    client = service.client
    whole = client.tokenize("The sea is wide.")
    num_given = len(client.tokenize("The sea"))
    by_text = client.score("The sea", " is wide.", mode="full_depth")
    by_ids = client.score(whole[:num_given], whole[num_given:], mode="full_depth")
    mixed = client.score(whole[:num_given], " is wide.", mode="full_depth")
    assert by_text.token_ids == by_ids.token_ids == mixed.token_ids == whole[num_given:]
    assert by_text.log_probability == by_ids.log_probability == mixed.log_probability
    assert by_text.text == " is wide."
    assert all(not entry.top for entry in by_text.logprobs)
    own = client.score("The sea is wide.", mode="full_depth")
    assert own.token_ids == whole[1:]
    assert [entry.chosen for entry in own.logprobs[num_given - 1 :]] == pytest.approx(
        [entry.chosen for entry in by_text.logprobs], abs=0.15
    )
    greedy = client.generate("The sea", max_new_tokens=5, ignore_eos=True, mode="full_depth")
    assert client.score("The sea", greedy.token_ids, mode="full_depth").is_greedy
    assert not by_text.is_greedy


def test_the_server_tells_its_load(service: Service) -> None:
    service.client.generate("The sea", max_new_tokens=3, ignore_eos=True)
    load = service.client.load()
    assert (load.running_request_count, load.waiting_request_count, load.worker_count) == (0, 0, 1)
    assert load.slot_count == service.client.model_info().slot_count
    assert load.decode_tokens_per_second is not None
    assert not load.is_draining


def test_a_seed_repeats_text_and_decisions_and_streaming_changes_neither(service: Service) -> None:
    options = {"temperature": 0.8, "top_p": 0.9, "seed": 11, "max_new_tokens": 30, "return_decisions": True}
    first = service.client.generate(CHAT, **options)
    with service.client.stream(CHAT, **options) as stream:
        pieces = [delta.text for delta in stream]
        second = stream.final()
    assert second.text == first.text == "".join(pieces)
    assert second.token_ids == first.token_ids
    assert second.decisions == first.decisions


@pytest.fixture(scope="module")
def repeatable(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Iterator[DashClient]:
    """A server whose answers do not depend on what else is in a step. Its default mode is EXACT.

    In bfloat16 this model, which is too odd to be compiled, rounds several rows otherwise than one.
    """
    own = {**REPEATABLE, "DASH_GROUP_PLANNER": "false", "DASH_DEFAULT_MODE": "exact"}
    running = Service(tmp_path_factory.mktemp("repeatable"), tiny_folder, **own)
    yield running.client
    assert running.stop() == 0, running.log.read_text()


def test_without_the_group_planner_concurrent_requests_get_the_tokens_that_they_get_alone_also_in_a_session(
    repeatable: DashClient,
) -> None:
    modes = ({"mode": "full_depth"}, {"mode": "adaptive"}, {"mode": "fixed", "fixed_action": "int4"})

    def generate(number: int, asked: DashClient | Session = repeatable) -> tuple[int, ...]:
        prompt = f"request {number} " * (1 + number)
        return tuple(asked.generate(prompt, seed=number, max_new_tokens=20, **modes[number % 3]).token_ids)

    alone = [generate(number) for number in range(9)]
    with ThreadPoolExecutor(9) as pool, repeatable.session() as session:
        assert list(pool.map(generate, range(9))) == alone
        assert list(pool.map(generate, range(9), [session] * 9)) == alone


def test_exact_mode_writes_full_depths_text_and_counts_its_drafts(repeatable: DashClient) -> None:
    options = {"max_new_tokens": 60, "ignore_eos": True, "return_decisions": True, "logprobs": 2}
    drafting = {"compute_budget": 1.0, "policy_name": "frontier"}
    full = repeatable.generate(CHAT, mode="full_depth", **options)
    with repeatable.stream(CHAT, **drafting, **options) as stream:
        exact = stream.final()
    unary = repeatable.generate(CHAT, **drafting, **options)
    assert exact.text == unary.text == full.text
    assert exact.token_ids == unary.token_ids == full.token_ids
    assert exact.decisions == full.decisions
    assert exact.started.mode == "exact"
    drafts = exact.usage.speculation
    assert drafts is not None
    assert drafts.drafted_token_count == drafts.accepted_token_count + drafts.wasted_token_count
    # A stop string may fall anywhere in a draft: what comes after it is neither given out nor counted.
    stop = full.text[len(full.text) // 2 :][:3]
    stopped = repeatable.generate(CHAT, mode="exact", stop=stop, **options)
    expected = repeatable.generate(CHAT, mode="full_depth", stop=stop, **options)
    assert stopped.text == expected.text
    assert stopped.token_ids == expected.token_ids
    assert stopped.usage.output_token_count == len(stopped.token_ids)


def test_tokenizing_agrees_with_what_a_generation_is_charged(service: Service) -> None:
    assert (
        len(service.client.tokenize(CHAT)) == service.client.generate(CHAT, max_new_tokens=1).usage.prompt_token_count
    )


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"mode": "adaptive", "compute_budget": 0.001}, "parameters.skip.compute_budget"),
        ({"logit_bias": {100_000: 1.0}}, "parameters.sampling.logit_bias"),
    ],
)
def test_bad_input_is_refused_by_field_and_the_next_request_is_served(
    service: Service, options: dict[str, object], field: str
) -> None:
    with pytest.raises(InvalidArgumentError) as refusal:
        service.client.generate("x", **options)  # type: ignore[arg-type]
    assert refusal.value.field_violations[0].field.startswith(field)
    assert service.client.generate("x", max_new_tokens=1).token_ids
