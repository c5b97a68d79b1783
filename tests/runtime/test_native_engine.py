"""An engine over native code: every mode, alone and in a batch, and a policy that native code evaluates."""

import json

import pytest
import torch

from dash_runtime.actions import Action
from dash_runtime.commands.evaluate import judged_engine
from dash_runtime.config import EngineConfig, GenerationRequest, Mode, SkipOptions, StoppingParameters
from dash_runtime.constraint import Constraint, ConstraintKind
from dash_runtime.engine.engine import Engine
from dash_runtime.policy.catalog import FRONTIER
from dash_runtime.policy.policy_file import load_policy
from dash_runtime.startup.build import BuildOptions, build_engine
from dash_runtime.training.loaded_model import LoadedModel, ModelOptions
from tests.runtime.native_model import NUM_THREADS, SmallModel
from tests.runtime.random_policy import NAME
from tests.runtime.support import drain, finished, tokens

pytestmark = pytest.mark.usefixtures("short_measurements")

NUM_TOKENS = 24
MODES = {
    "full depth": SkipOptions(Mode.FULL_DEPTH),
    "adaptive": SkipOptions(Mode.ADAPTIVE, policy_name=NAME),
    "exact": SkipOptions(Mode.EXACT, draft_length=7),
    **{action.name: SkipOptions(Mode.FIXED, fixed_action=action) for action in Action},
}


def engine_of(
    model: SmallModel, group_planner: bool, num_slots: int = 24, cache_tokens: int = 4096, rounds_prompts: bool = True
) -> Engine:
    options = BuildOptions(
        devices=["cpu"],
        num_threads=NUM_THREADS,
        policy_file=model.policy_file,
        actions=tuple(Action),
        checks_kept_costs=False,  # a table that is replaced between two requests is another price for the second
        least_drafting_gain=0.0,
    )
    config = EngineConfig(
        num_slots=num_slots,
        cache_tokens=cache_tokens,
        group_planner=group_planner,
        rounds_prompts=rounds_prompts,
    )
    said: list[str] = []
    torch_threads = torch.get_num_threads()
    try:
        engine = build_engine(model.folder, model.cache_folder, options, config, said.append)
    finally:
        torch.set_num_threads(torch_threads)  # or the tests that follow in this process would have more
    assert not any("compil" in sentence for sentence in said), said
    assert engine.facts.has_native_code
    return engine


@pytest.fixture(scope="module", params=[True, False], ids=["planner", "no planner"])
def engine(request: pytest.FixtureRequest, small_model: SmallModel) -> Engine:
    return engine_of(small_model, request.param)


def requests(count: int = 1) -> list[GenerationRequest]:
    """Requests of every mode, `count` of each, with prompts of different lengths."""
    stopping = StoppingParameters(NUM_TOKENS, ignore_eos=True)
    return [
        GenerationRequest(
            f"{name} {number}", list(range(1, 20 + 3 * number)), stopping, skip=skip, return_decisions=True
        )
        for name, skip in MODES.items()
        for number in range(count)
    ]


def alone(engine: Engine, request: GenerationRequest) -> list[int]:
    engine.submit(request)
    (events,) = drain(engine).values()
    return tokens(events)


def test_every_mode_ends_with_all_its_tokens_and_the_actions_that_it_asked_for(engine: Engine) -> None:
    for request in requests():
        engine.submit(request)
        (events,) = drain(engine).values()
        assert len(tokens(events)) == NUM_TOKENS
        counts = finished(events).depth.action_counts
        fixed = request.skip.fixed_action
        if fixed is not None:
            assert counts[fixed] >= 4 * (NUM_TOKENS - 1)
        if request.skip.mode is Mode.ADAPTIVE:
            assert sum(count > 0 for count in counts.values()) >= 3
        if request.skip.mode is Mode.EXACT:
            speculation = finished(events).speculation
            assert speculation is not None
            assert speculation.num_drafted > 0


def test_the_policy_is_evaluated_by_native_code_within_a_rows_pass(engine: Engine) -> None:
    facts = [policy.name for policy in engine.facts.policies if policy.learned and policy.name != FRONTIER]
    assert facts == [NAME]
    policy = engine._catalog._learned[NAME]
    assert policy.evaluator is not None
    assert policy.decides_in_pass


def test_a_policy_is_judged_by_the_tokens_that_a_server_gives(small_model: SmallModel) -> None:
    options = ModelOptions(str(small_model.folder), None, "cpu", small_model.cache_folder, None)
    model = LoadedModel(options, lambda line: None, tuple(Action))
    policy = load_policy(small_model.policy_file, model.config, model.fingerprint, dtype=torch.bfloat16, device="cpu")
    judged = judged_engine(model.served_decoder, policy, policy.costs)
    assert judged._catalog._learned[NAME].decides_in_pass
    served = engine_of(small_model, True, rounds_prompts=False)
    own = {request.skip: request for request in requests()}
    for mode in ("full depth", "INT8", "INT4"):
        assert alone(judged, own[MODES[mode]]) == alone(served, own[MODES[mode]]), mode


@pytest.mark.parametrize("mode", ["full depth", "adaptive"])
def test_rows_that_go_on_are_found_where_their_keys_were_moved(small_model: SmallModel, mode: str) -> None:
    engine = engine_of(small_model, False, num_slots=2, cache_tokens=112)
    # The first one leaves a gap that is too small for the third, so the second, which goes on, is moved.
    sizes = {"leaves": (40, 8), "goes on": (8, 40), "needs room": (40, 24)}
    own = {
        name: GenerationRequest(
            name, list(range(1, prompt + 1)), StoppingParameters(tokens, ignore_eos=True), skip=MODES[mode]
        )
        for name, (prompt, tokens) in sizes.items()
    }
    expected = alone(engine, own["goes on"])
    for request in own.values():
        engine.submit(request)
    together = drain(engine)
    assert engine._pool.num_moves == 1
    assert tokens(together["goes on"]) == expected


def test_exact_puts_out_full_depths_own_tokens(engine: Engine) -> None:
    own = {request.request_id: alone(engine, request) for request in requests(3)}
    for number in range(3):
        assert own[f"exact {number}"] == own[f"full depth {number}"]


def test_forced_text_is_drafted_in_any_number_and_verified_to_full_depths_own_tokens(engine: Engine) -> None:
    names = {"a": "Ann", "the_city_where": "Rome", "ab": "x", "c_1": "y"}
    schema = {
        "type": "object",
        "properties": {name: {"enum": [value, value[::-1] + "!"]} for name, value in names.items()},
        "required": list(names),
        "additionalProperties": False,
    }
    constraint = Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(schema))
    own: dict[str, list[int]] = {}
    for name in ("exact", "full depth"):
        stopping = StoppingParameters(120)
        request = GenerationRequest(name, [1, 2, 3], stopping, skip=MODES[name], constraint=constraint)
        engine.submit(request)
        (events,) = drain(engine).values()
        own[name] = tokens(events)
    assert own["exact"] == own["full depth"]
    assert list(json.loads(bytes(own["exact"]))) == list(names)


def test_a_batch_of_all_modes_equals_the_same_requests_alone_without_the_planner(small_model: SmallModel) -> None:
    engine = engine_of(small_model, group_planner=False)
    expected = {request.request_id: alone(engine, request) for request in requests(2)}
    for request in requests(2):
        engine.submit(request)
    together = {request_id: tokens(events) for request_id, events in drain(engine).items()}
    assert together == expected
