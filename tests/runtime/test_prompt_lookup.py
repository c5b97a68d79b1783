"""A sequence runs what its text had before beside its last token, and puts out what it would without."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dash_runtime.actions import Action, LatencyTable
from dash_runtime.checkpoints import open_weights
from dash_runtime.config import (
    EngineConfig,
    GenerationRequest,
    Mode,
    SamplingParameters,
    SkipOptions,
    StoppingParameters,
)
from dash_runtime.engine.engine import Engine
from dash_runtime.engine.guesses import Guesses, PassSeconds
from dash_runtime.engine.planner import GroupPlanner
from dash_runtime.events import EndReason, TokenProduced
from dash_runtime.native.library import NativeLibrary
from dash_runtime.policy.catalog import PolicyCatalog
from dash_runtime.policy.model_sketch import model_fingerprint
from dash_runtime.policy.policy_file import load_policy, save_policy
from dash_runtime.startup.measured_engine import assemble_engine
from dash_runtime.startup.native_code import with_native_code
from tests.runtime.native_model import BUDGETS, native_decoder, save_small_model
from tests.runtime.random_policy import NAME, random_policy
from tests.runtime.support import (
    ALL_ACTIONS,
    CPU,
    drain,
    finished,
    num_layer_runs,
    run_alone,
    some_affine,
    some_costs,
    tokens,
)

CHEAP = GroupPlanner(LatencyTable((1, 8), dict.fromkeys(ALL_ACTIONS, (1.0, 1.2))))
PROMPT = [*range(30, 50)] * 3
NUM_TOKENS = 150
MODES = {
    "adaptive": SkipOptions(Mode.ADAPTIVE, policy_name=NAME, compute_budget=BUDGETS[0]),
    **{action.name: SkipOptions(Mode.FIXED, fixed_action=action) for action in Action},
}
SAMPLINGS = {
    "greedy": SamplingParameters(),
    "drawn": SamplingParameters(temperature=0.006, top_p=0.9, seed=4),
    "varied": SamplingParameters(temperature=1.0, top_k=10, seed=4),
}

MakeEngine = Callable[..., Engine]


@pytest.fixture(scope="module")
def make_engine(tmp_path_factory: pytest.TempPathFactory, native_library: NativeLibrary) -> MakeEngine:
    """Makes engines of a model whose layers change so little that a token decides the next one nearly alone, and the
    text repeats itself."""
    return engines_of(tmp_path_factory.mktemp("calm"), native_library, "qwen2-sliding-window", initializer_range=0.004)


@pytest.fixture(scope="module")
def make_wild_engine(tmp_path_factory: pytest.TempPathFactory, native_library: NativeLibrary) -> MakeEngine:
    """Makes engines of a model in which every bit of a key matters, and whose policy mostly attends to rounded ones."""
    actions = Action.SKIP, Action.INT8
    return engines_of(tmp_path_factory.mktemp("wild"), native_library, "mistral", actions)


@pytest.fixture(scope="module")
def make_apart_engine(tmp_path_factory: pytest.TempPathFactory, native_library: NativeLibrary) -> MakeEngine:
    """Makes engines like `make_engine`, in which no number of rows shares a product: bits would depend on it."""
    folder = tmp_path_factory.mktemp("apart")
    return engines_of(folder, native_library, "qwen2-sliding-window", shares_heads=False, initializer_range=0.004)


def engines_of(
    folder: Path,
    library: NativeLibrary,
    family: str,
    actions: Sequence[Action] = ALL_ACTIONS,
    shares_heads: bool = True,
    **options: float,
) -> MakeEngine:
    # The head runs natively in FULL, too: the vocabulary fills blocks.
    model = save_small_model(folder, family, vocab_size=320, **options)
    decoder = native_decoder(model.folder, library, shares_heads=shares_heads)
    fingerprint = model_fingerprint(decoder.config, open_weights(model.folder))
    save_policy(model.policy_file, random_policy(model.folder, BUDGETS, 1, actions=actions), fingerprint)
    policy = load_policy(model.policy_file, decoder.config, fingerprint, dtype=decoder.dtype, device=CPU)
    policy = with_native_code(policy, library, None)

    def make(planner: GroupPlanner | None = CHEAP, **options: object) -> Engine:
        catalog = PolicyCatalog(some_costs(), ALL_ACTIONS, some_affine(decoder), [policy])
        config = EngineConfig(**{"prompt_lookup": True, **options})  # type: ignore[arg-type]
        return assemble_engine(decoder, catalog, config, 512, planner=planner)

    return make


def request(mode: str, sampling: str = "greedy", **changes: object) -> GenerationRequest:
    stopping = StoppingParameters(NUM_TOKENS, ignore_eos=True)
    own = GenerationRequest("own", PROMPT, stopping, SAMPLINGS[sampling], MODES[mode], return_decisions=True)
    return replace(own, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("sampling", ["greedy", "drawn"])
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "adaptive"])
def test_the_output_of_a_plan_is_the_same_in_fewer_passes(make_engine: MakeEngine, mode: str, sampling: str) -> None:
    own = request(mode, sampling)
    plain, num_steps = run_alone(make_engine(prompt_lookup=False), replace(own, is_immediate=True))
    assert num_steps == NUM_TOKENS
    each, num_guessing_steps = run_alone(make_engine(), replace(own, is_immediate=True))
    assert num_guessing_steps < 0.8 * NUM_TOKENS
    together, _ = run_alone(make_engine(), own)
    produced = [[event for event in events if isinstance(event, TokenProduced)] for events in (plain, each, together)]
    assert produced[0] == produced[1] == produced[2]
    depths = [finished(events).depth for events in (plain, each, together)]
    assert depths[1].num_decode_tokens == depths[0].num_decode_tokens
    assert depths[1].mean_cost < depths[0].mean_cost


@pytest.mark.parametrize("sampling", ["greedy", "drawn"])
@pytest.mark.parametrize("mode", MODES)
def test_guesses_are_the_same_whether_tokens_come_together_or_one_by_one(
    make_engine: MakeEngine, mode: str, sampling: str
) -> None:
    for seed in range(3):
        prompt = [*PROMPT, *torch.randint(20, 60, (40,), generator=torch.Generator().manual_seed(seed)).tolist()]
        own = request(mode, sampling, prompt_token_ids=prompt)
        runs = [
            run_alone(make_engine(record_steps=NUM_TOKENS), replace(own, is_immediate=is_it))[0]
            for is_it in (True, False)
        ]
        one, other = [[event for event in events if isinstance(event, TokenProduced)] for events in runs]
        assert one == other
        depths = [finished(events).depth for events in runs]
        for name in ("num_decode_tokens", "speculative_action_counts", "layer_action_counts"):
            assert getattr(depths[0], name) == getattr(depths[1], name)
        assert depths[0].total_cost == pytest.approx(depths[1].total_cost)
        traces = [finished(events).trace for events in runs]
        assert traces[0] is not None
        assert traces[1] is not None
        for step, its_like in zip(traces[0].steps, traces[1].steps, strict=True):
            for name in ("kind", "token_ids", "actions", "scores", "cost_spent"):
                assert getattr(step, name) == getattr(its_like, name)
            assert step.cost == pytest.approx(its_like.cost)
        assert sum(step.cost for step in traces[1].steps) == pytest.approx(depths[1].total_cost)


@pytest.mark.parametrize("mode", MODES)
def test_wrong_guesses_leave_nothing_behind(make_wild_engine: MakeEngine, mode: str) -> None:
    free = GroupPlanner(LatencyTable((1, 8), dict.fromkeys(ALL_ACTIONS, (1.0, 1.0))))
    for seed in range(3):
        prompt = torch.randint(20, 24, (60,), generator=torch.Generator().manual_seed(seed)).tolist()
        own = request(mode, "varied", prompt_token_ids=prompt)
        engine = make_wild_engine(free, record_steps=NUM_TOKENS)
        each, together = (run_alone(engine, replace(own, is_immediate=is_it))[0] for is_it in (True, False))
        assert tokens(each) == tokens(together)
        # Scores show every bit of what a row attended to.
        one, other = (finished(events).trace for events in (each, together))
        assert one is not None
        assert other is not None
        assert [step.scores for step in one.steps] == [step.scores for step in other.steps]
        plain, _ = run_alone(make_wild_engine(free, prompt_lookup=False), own)
        counts, own_counts = (num_layer_runs(events) for events in (plain, together))
        assert own_counts > 1.5 * counts
        plans = b"".join(event.plan for event in together if isinstance(event, TokenProduced))
        depth = finished(together).depth
        decoded = plans[len(depth.layer_action_counts) :]
        assert depth.action_counts == {action: decoded.count(action) for action in Action}
        if mode != "adaptive":
            assert tokens(plain) == tokens(together)


def test_a_learned_policy_is_not_asked_about_passes_with_guesses(make_engine: MakeEngine) -> None:
    events, _ = run_alone(make_engine(record_steps=NUM_TOKENS), request("adaptive"))
    trace = finished(events).trace
    assert trace is not None
    later = [step for step in trace.steps if not step.cost]  # tokens of a pass after its first one
    assert len(later) > 5
    assert not any(step.scores for step in later)
    assert not any(Action.SKIP in step.actions for step in later)
    assert any(step.scores for step in trace.steps)


@pytest.mark.parametrize(
    "changes",
    [
        {"logprobs": 3},
        {"sampling": SamplingParameters(repetition_penalty=1.01)},
        {"sampling": SamplingParameters(temperature=0.006, frequency_penalty=0.001, logit_bias={40: 0.01}, seed=2)},
    ],
    ids=["logprobs", "repetition", "frequency"],
)
def test_what_looks_at_each_token_gets_what_it_gets_without(
    make_engine: MakeEngine, changes: dict[str, object]
) -> None:
    own = replace(request("INT4"), **changes)  # type: ignore[arg-type]
    outputs = []
    for prompt_lookup in (True, False):
        events, num_steps = run_alone(make_engine(prompt_lookup=prompt_lookup), own)
        assert (num_steps < NUM_TOKENS) is prompt_lookup
        outputs.append([(event.token_id, event.logprobs) for event in events if isinstance(event, TokenProduced)])
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("is_immediate", [True, False])
@pytest.mark.parametrize("number", range(20, 40, 3))
def test_the_output_may_end_among_guesses(make_engine: MakeEngine, is_immediate: bool, number: int) -> None:
    own = request("FULL", is_immediate=is_immediate)
    whole = tokens(run_alone(make_engine(prompt_lookup=False), own)[0])
    engine = make_engine()
    events, _ = run_alone(engine, replace(own, stopping=StoppingParameters(number, ignore_eos=True)))
    assert tokens(events) == whole[:number]
    assert finished(events).reason is EndReason.LENGTH
    stop = StoppingParameters(NUM_TOKENS, stop_token_ids=frozenset({whole[number]}), ignore_eos=True)
    events, _ = run_alone(engine, replace(own, stopping=stop))
    assert tokens(events) == whole[: whole.index(whole[number]) + 1]
    assert finished(events).reason is EndReason.STOP_TOKEN


@pytest.mark.parametrize("num_tokens", [NUM_TOKENS, 100])
@pytest.mark.parametrize("kind", ["greedy", "varied"])
def test_an_answer_says_how_many_guesses_were_right(make_engine: MakeEngine, kind: str, num_tokens: int) -> None:
    stop = StoppingParameters(num_tokens, ignore_eos=True)
    own = replace(request("INT4", kind, is_immediate=True), stopping=stop)
    by_step, num_steps = run_alone(make_engine(), own)
    in_bursts, _ = run_alone(make_engine(), replace(own, is_immediate=False))
    guesses = finished(by_step).speculation
    assert guesses is not None
    assert guesses == finished(in_bursts).speculation
    assert guesses.num_accepted == guesses.num_accepted_from_text == num_tokens - num_steps
    assert guesses.num_accepted > 5 or kind == "varied"
    assert guesses.num_drafted >= guesses.num_accepted + guesses.accepted_lengths[0]
    assert guesses.num_verifications < num_steps
    without, _ = run_alone(make_engine(prompt_lookup=False), own)
    assert finished(without).speculation is None


@pytest.mark.parametrize("is_immediate", [True, False])
def test_memory_of_wrong_guesses_is_zeros_again(make_wild_engine: MakeEngine, is_immediate: bool) -> None:
    free = GroupPlanner(LatencyTable((1, 8), dict.fromkeys(ALL_ACTIONS, (1.0, 1.0))))
    engine = make_wild_engine(free, prefix_cache_tokens=0)
    for num_steps in range(3, 12):
        engine.submit(request("INT4", "varied", is_immediate=is_immediate))
        for _ in range(num_steps):
            engine.step()
        engine.cancel("own")
        assert not any(memory.any() for memory in engine._pool.memories)


def test_neighbours_of_one_plan_guess_together(make_apart_engine: MakeEngine) -> None:
    own = request("FULL", request_id="own"), request("FULL", "drawn", request_id="other")
    alone = [tokens(run_alone(make_apart_engine(prompt_lookup=False), each)[0]) for each in own]
    engine = make_apart_engine()
    for each in own:
        engine.submit(each)
    num_together, together = 0, {each.request_id: list[int]() for each in own}
    while engine.has_work:
        events = [event for event in engine.step() if isinstance(event, TokenProduced)]
        num_together += len(events) > 2 and len({event.request_id for event in events}) == 2
        for event in events:
            together[event.request_id].append(event.token_id)
    assert list(together.values()) == alone
    assert num_together > 5


def test_neighbours_of_several_plans_do_not_guess(make_engine: MakeEngine) -> None:
    engine = make_engine()
    for mode in ("FULL", "INT4"):
        engine.submit(request(mode, request_id=mode))
    events = [engine.step() for _ in range(NUM_TOKENS // 2)]
    assert max(sum(isinstance(event, TokenProduced) for event in step) for step in events) == 2
    drain(engine)


@pytest.mark.parametrize("planner", [None, GroupPlanner(LatencyTable((1, 8), dict.fromkeys(ALL_ACTIONS, (1.0, 30.0))))])
def test_nothing_is_guessed_where_rows_do_not_share_or_it_does_not_pay(
    make_engine: MakeEngine, planner: GroupPlanner | None
) -> None:
    _, num_steps = run_alone(make_engine(planner), request("INT4", is_immediate=True))
    assert num_steps == NUM_TOKENS


def test_guesses_depend_on_tokens_and_not_on_how_many_came_together() -> None:
    output = torch.randint(0, 6, (200,), generator=torch.Generator().manual_seed(1)).tolist()
    seconds = PassSeconds(LatencyTable((1, 8), {Action.FULL: (1.0, 1.3)}), [Action.FULL])
    each, some = (Guesses(seconds, None, [1, 2, 3, 1, 2], len(output)) for _ in range(2))
    wanted = [each.wanted_alone(output[:length], 300 - length) for length in range(1, 201)]
    for length in (1, 33, 34, 60, 65, 130, 162, 200):
        assert some.wanted_alone(output[:length], 300 - length) == wanted[length - 1]
    assert len({len(own) for own in wanted}) > 2
