"""Prompts that arrive together share passes, leave time to those who decode, and run in the action that is theirs."""

from collections.abc import Hashable, Sequence

import pytest

from dash_runtime.actions import Action
from dash_runtime.config import EngineConfig, GenerationRequest, Mode, SkipOptions, StoppingParameters
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.engine.engine import Engine
from dash_runtime.engine.prompt_pace import PromptPace
from dash_runtime.events import SlotGranted
from dash_runtime.layers.compensation import Identity
from dash_runtime.native.library import NativeLibrary
from dash_runtime.policy.catalog import PolicyCatalog
from dash_runtime.startup.measure_prompts import fastest_prefill, measure_prompts
from dash_runtime.startup.measured_engine import assemble_engine
from tests.runtime.native_model import SmallModel, native_decoder
from tests.runtime.support import ALL_ACTIONS, drain, finished, produced, run, some_costs, some_plans, tokens

INT4 = SkipOptions(Mode.FIXED, fixed_action=Action.INT4)


@pytest.fixture(scope="module")
def decoder(small_model: SmallModel, native_library: NativeLibrary) -> Decoder:
    return native_decoder(small_model.folder, native_library)


def engine_of(decoder: Decoder, prefill: Action | None = None, prefix_cache_tokens: int = 0) -> Engine:
    catalog = PolicyCatalog(
        some_costs(decoder.num_layers), ALL_ACTIONS, Identity(), (), plans=some_plans(decoder.num_layers)
    )
    catalog.learn(prefill_action=prefill)
    config = EngineConfig(num_slots=40, cache_tokens=8192, prefix_cache_tokens=prefix_cache_tokens, prompt_lookup=False)
    return assemble_engine(decoder, catalog, config, 512, frozenset())


def prompt(number: int, length: int) -> list[int]:
    return [(31 * place + 7 * number + 5) % 250 for place in range(length)]


def request(
    number: int, length: int, skip: SkipOptions = INT4, count: int = 3, *, shows: bool = False
) -> GenerationRequest:
    stopping = StoppingParameters(count, ignore_eos=True)
    return GenerationRequest(f"{number}", prompt(number, length), stopping, skip=skip, return_decisions=shows)


def passes_of(engine: Engine, requests: Sequence[GenerationRequest]) -> list[tuple[int, int]]:
    """Returns the rows and layers of each prompt pass, or part of one, that these requests take together."""
    seen: list[tuple[int, int]] = []
    pace = engine._prompts.pace
    passed = pace.passed

    def note(kind: Hashable, num_rows: int, num_layers: int, seconds: float) -> None:
        seen.append((num_rows, num_layers))
        passed(kind, num_rows, num_layers, seconds)

    pace.passed = note  # type: ignore[method-assign]
    run(engine, *requests)
    return seen


def test_short_prompts_that_arrive_together_share_a_pass(decoder: Decoder) -> None:
    together = [request(number, 7 + number % 3) for number in range(30)]
    assert passes_of(engine_of(decoder), together) == [(240, decoder.num_layers)]


def test_a_prompt_has_the_tokens_that_it_has_alone(decoder: Decoder) -> None:
    requests = [request(number, length) for number, length in enumerate((3, 170, 64, 1, 65, 300, 12))]
    together = run(engine_of(decoder), *requests)
    for own in requests:
        alone = run(engine_of(decoder), own)[own.request_id]
        assert tokens(alone) == tokens(together[own.request_id])


def test_those_who_decode_have_a_token_after_each_part_of_a_prompts_pass(decoder: Decoder) -> None:
    engine = engine_of(decoder)
    engine.submit(request(0, 4, count=200))
    for _ in range(6):
        engine.step()
    engine._prompts.pace.stepped = lambda seconds: None  # type: ignore[method-assign]
    engine._prompts.pace._step_seconds = 0.0  # so short that each step has room for one layer
    engine.submit(request(1, 40))
    num_steps = 0
    while "1" not in engine._running or engine._running["1"].num_prompt_tokens_left:
        assert sum(own.request_id == "0" for own in produced(engine.step())) == 1
        num_steps += 1
    assert num_steps == 3 * (decoder.num_layers + 1)  # 16, 16 and 8 rows, each with a step for the head


def test_whoever_is_cancelled_within_a_pass_leaves_the_others_their_tokens(decoder: Decoder) -> None:
    alone = run(engine_of(decoder), request(2, 90))["2"]
    engine = engine_of(decoder)
    engine.submit(request(0, 4, count=200))
    for _ in range(3):
        engine.step()
    engine._prompts.pace.stepped = lambda seconds: None  # type: ignore[method-assign]
    engine._prompts.pace._step_seconds = 0.0
    for number in (1, 2):
        engine.submit(request(number, 90))
    engine.step()
    engine.step()
    engine.cancel("1")
    engine.submit(request(3, 90))  # gets the memory of the first
    engine.step()
    engine.cancel("0")
    events = drain(engine)
    assert tokens(events["2"]) == tokens(alone)
    assert tokens(events["3"]) == tokens(run(engine_of(decoder), request(3, 90))["3"])


def test_only_those_at_full_depth_keep_their_prompts_from_the_faster_action(decoder: Decoder) -> None:
    engine = engine_of(decoder, Action.INT8, prefix_cache_tokens=1024)
    full = SkipOptions(Mode.FIXED, fixed_action=Action.FULL)
    adaptive = SkipOptions(Mode.ADAPTIVE, compute_budget=0.5)
    modes = [SkipOptions(Mode.FULL_DEPTH), full, SkipOptions(Mode.EXACT), INT4, adaptive]
    expected = [Action.FULL, Action.FULL, Action.FULL, Action.INT8, Action.INT8]
    firsts: dict[Action, set[int]] = {Action.FULL: set(), Action.INT8: set()}
    for skip, action in zip(modes, expected, strict=True):
        ((granted, *events),) = run(engine, request(1, 200, skip, shows=True)).values()
        assert isinstance(granted, SlotGranted)
        assert granted.prefill_action is action, (skip, granted.prefill_action)
        first = produced(events)[0]
        assert set(first.plan) == {action}
        firsts[action].add(first.token_id)
        # What was kept of a prompt is for those of its own precision.
        is_first = skip in (modes[0], INT4)
        assert finished(events).num_cached_prompt_tokens == (0 if is_first else 192), skip
    assert all(len(own) == 1 for own in firsts.values())


def test_prompts_are_rounded_only_where_that_is_clearly_faster(decoder: Decoder) -> None:
    assert fastest_prefill({Action.FULL: 1.0, Action.INT8: 0.5}) is Action.INT8
    assert fastest_prefill({Action.FULL: 1.0, Action.INT8: 0.95}) is Action.FULL
    assert fastest_prefill({Action.INT8: 1.0}) is Action.INT8
    seconds = measure_prompts(decoder, rounds=1)
    assert seconds.keys() == {Action.FULL, Action.INT8}
    assert min(seconds.values()) > 0


def test_a_part_of_a_pass_takes_what_a_few_steps_of_others_take() -> None:
    pace = PromptPace(16, 256)
    assert pace.num_rows("full", is_decoding=True) == 256  # nobody has decoded yet
    pace.stepped(0.025)
    assert pace.num_rows("full", is_decoding=True) == 16
    assert pace.num_layers("full", 16) == 1
    pace.passed("full", 16, 10, 0.16)  # as 64 rows would
    assert pace.num_rows("full", is_decoding=False) == 256
    assert pace.num_rows("full", is_decoding=True) == 150
    assert pace.num_layers("full", 64) == 2
    pace.passed("full", 128, 1, 0.02)
    assert pace.num_rows("full", is_decoding=True) == 240
    assert pace.num_layers("full", 128) == 1
    assert pace.num_layers("full", 1) == 3
    assert pace.seconds("full", 128, 3) == pytest.approx(0.06)
    for _ in range(20):
        pace.stepped(0.001)
    assert pace.num_rows("full", is_decoding=True) == 16
    assert pace.num_layers("full", 16) == 1
    assert pace.num_rows("int8", is_decoding=True) == 16
