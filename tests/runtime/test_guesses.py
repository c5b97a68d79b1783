"""A sequence runs the tokens that its constraint forces in one pass, and puts out what it would without."""

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
from dash_runtime.constraint import Constraint, ConstraintKind
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.engine.constraints import ConstraintCompiler
from dash_runtime.engine.guesses import Guesses, PassSeconds
from dash_runtime.engine.planner import GroupPlanner
from dash_runtime.events import EndReason, SequenceFinished, SlotGranted, TokenProduced
from dash_runtime.native.library import NativeLibrary
from dash_runtime.policy.catalog import PolicyCatalog
from dash_runtime.policy.model_sketch import model_fingerprint
from dash_runtime.policy.policy_file import load_policy
from dash_runtime.startup.measured_engine import assemble_engine
from tests.runtime.native_model import BUDGETS, SmallModel, native_decoder
from tests.runtime.planned_engine import ACTIONS, EOS, MODES, make_engine
from tests.runtime.random_policy import NAME
from tests.runtime.support import (
    ALL_ACTIONS,
    CPU,
    AtOnce,
    finished,
    load_decoder,
    run_alone,
    some_affine,
    some_costs,
    tokens,
)

CHEAP = GroupPlanner(LatencyTable((1, 8), {Action.SKIP: (0.1, 0.1), Action.FULL: (1.0, 1.2)}))
DEAR = GroupPlanner(LatencyTable((1, 8), {Action.SKIP: (0.1, 1.0), Action.FULL: (1.0, 14.0)}))
FORCED = Constraint(ConstraintKind.REGEX, "(alpha|omega)-[0-9]{2}-constant-[a-f]{2}-text")


@pytest.fixture(scope="module")
def decoder(tiny_folder: Path) -> Decoder:
    return load_decoder(tiny_folder, torch.float32, ACTIONS)


def request(name: str, mode: str, max_new_tokens: int = 60, **options: object) -> GenerationRequest:
    stopping = StoppingParameters(max_new_tokens)
    own = GenerationRequest(name, [1, 2, 3], stopping, skip=MODES[mode], constraint=FORCED, return_decisions=True)
    return replace(own, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["full", "adaptive", "fixed"])
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_the_output_is_the_same_in_fewer_steps(
    decoder: Decoder, compiler: ConstraintCompiler, mode: str, temperature: float
) -> None:
    own = request("r", mode, sampling=SamplingParameters(temperature=temperature, seed=4), logprobs=2)
    guessed, num_steps = run_alone(make_engine(decoder, frozenset({EOS}), constraints=compiler, planner=CHEAP), own)
    plain, num_plain_steps = run_alone(make_engine(decoder, frozenset({EOS}), constraints=compiler), own)
    assert len(tokens(plain)) == num_plain_steps == len("alpha-00-constant-aa-text")
    assert num_steps < num_plain_steps / 2
    for one, other in zip(guessed, plain, strict=True):
        if isinstance(one, TokenProduced) and isinstance(other, TokenProduced):
            assert (one.token_id, one.plan) == (other.token_id, other.plan)
            assert one.logprobs is not None
            assert other.logprobs is not None
            assert one.logprobs.chosen == pytest.approx(other.logprobs.chosen, abs=1e-4)
    assert finished(guessed).reason is finished(plain).reason is EndReason.END_OF_SEQUENCE
    depths = finished(guessed).depth, finished(plain).depth
    assert depths[0].num_decode_tokens == depths[1].num_decode_tokens
    assert depths[0].layer_action_counts == depths[1].layer_action_counts
    assert not any(depths[1].speculative_action_counts.values())
    assert depths[0].mean_cost < depths[1].mean_cost


@pytest.mark.parametrize("count", range(1, len("alpha-00-constant-aa-text") + 1))
def test_the_limit_may_fall_among_guesses(decoder: Decoder, compiler: ConstraintCompiler, count: int) -> None:
    engine = make_engine(decoder, frozenset({EOS}), constraints=compiler, planner=CHEAP)
    whole, _ = run_alone(engine, request("r", "full"))
    events, _ = run_alone(engine, request("r", "full", count))
    assert tokens(events) == tokens(whole)[:count]
    is_whole = count == len(tokens(whole))
    assert finished(events).reason is (EndReason.END_OF_SEQUENCE if is_whole else EndReason.LENGTH)


def test_a_stop_token_ends_the_output_among_guesses(decoder: Decoder, compiler: ConstraintCompiler) -> None:
    stopping = StoppingParameters(60, stop_token_ids=frozenset({ord("t")}))
    engine = make_engine(decoder, frozenset({EOS}), constraints=compiler, planner=CHEAP)
    events, _ = run_alone(engine, request("r", "full", stopping=stopping))
    assert bytes(tokens(events))[-len("-const") :] == b"-const"
    assert finished(events).reason is EndReason.STOP_TOKEN


def test_each_token_of_a_pass_is_recorded_and_the_first_has_its_cost(
    decoder: Decoder, compiler: ConstraintCompiler
) -> None:
    engine = make_engine(decoder, frozenset({EOS}), constraints=compiler, planner=CHEAP, record_steps=100)
    events, _ = run_alone(engine, request("r", "full"))
    trace, depth = finished(events).trace, finished(events).depth
    assert trace is not None
    assert [token_id for step in trace.steps for token_id in step.token_ids] == tokens(events)[1:]
    assert 0 < sum(step.cost > 0 for step in trace.steps) < len(trace.steps)
    assert sum(step.cost for step in trace.steps) == pytest.approx(depth.total_cost)


def test_nothing_is_guessed_where_it_does_not_pay(decoder: Decoder, compiler: ConstraintCompiler) -> None:
    dear = make_engine(decoder, frozenset({EOS}), constraints=compiler, planner=DEAR)
    events, num_steps = run_alone(dear, request("r", "full"))
    assert num_steps == len(tokens(events))


@pytest.mark.parametrize("others", [["full"] * 3, ["adaptive"], ["exact", "full"]], ids=" ".join)
def test_sequences_guess_together_where_one_plan_serves_all(
    decoder: Decoder, compiler: ConstraintCompiler, others: list[str]
) -> None:
    requests = [request("r", "full"), *(request(f"{mode} {place}", mode) for place, mode in enumerate(others))]
    requests.append(request("free", "full", 40, constraint=None))
    engine = make_engine(decoder, frozenset({EOS}), constraints=compiler, planner=CHEAP, least_gain=0.0)
    alone = {own.request_id: tokens(run_alone(engine, own)[0]) for own in requests}
    for own in requests:
        engine.submit(own)
    num_at_once = 0
    together: dict[str, list[int]] = {}
    is_over = False
    while engine.has_work:
        for event in (events := engine.step()):
            if isinstance(event, TokenProduced):
                together.setdefault(event.request_id, []).append(event.token_id)
        is_over = is_over or any(isinstance(event, SequenceFinished) for event in events)
        if not is_over:
            num_at_once = max(num_at_once, len(tokens([event for event in events if event.request_id == "r"])))
    if "adaptive" in others:  # whose skips are raised to what its neighbours run
        del alone["adaptive 0"], together["adaptive 0"]
    assert together == alone
    assert (num_at_once > 1) is ("adaptive" not in others)


def test_a_sequence_that_drafts_drafts_what_is_forced_as_before(decoder: Decoder, compiler: ConstraintCompiler) -> None:
    events, _ = run_alone(
        make_engine(decoder, frozenset({EOS}), constraints=compiler, planner=CHEAP, least_gain=0.0),
        request("r", "exact"),
    )
    drafts = finished(events).speculation
    assert drafts is not None
    assert drafts.num_accepted_from_text > 0


def test_a_cancelled_request_frees_its_memory_among_guesses(decoder: Decoder, compiler: ConstraintCompiler) -> None:
    engine = make_engine(decoder, frozenset({EOS}), constraints=compiler, planner=CHEAP)
    engine.submit(request("r", "full"))
    assert any(isinstance(event, SlotGranted) for event in engine.step())
    assert len(tokens(engine.step())) > 1
    engine.cancel("r")
    assert not engine.has_work
    assert engine.num_reserved_cache_tokens == 0


def test_a_learned_policy_is_not_asked_about_rows_with_guesses(
    small_model: SmallModel, native_library: NativeLibrary
) -> None:
    decoder = native_decoder(small_model.folder, native_library, shares_heads=True)
    fingerprint = model_fingerprint(decoder.config, open_weights(small_model.folder))
    policy = load_policy(small_model.policy_file, decoder.config, fingerprint, dtype=decoder.dtype, device=CPU)
    compiler = ConstraintCompiler(
        small_model.folder / "tokenizer.json", decoder.config.vocab_size, {EOS}, executor=AtOnce()
    )
    catalog = PolicyCatalog(some_costs(), ALL_ACTIONS, some_affine(decoder), [policy])
    planner = GroupPlanner(LatencyTable((1, 8), dict.fromkeys(ALL_ACTIONS, (1.0, 1.2))))
    engine = assemble_engine(decoder, catalog, EngineConfig(), 512, planner=planner, constraints=compiler)
    skip = SkipOptions(Mode.ADAPTIVE, policy_name=NAME, compute_budget=BUDGETS[0])
    engine.submit(request("r", "adaptive", skip=skip))
    engine.step()
    num_together = 0
    while engine.has_work:
        plans = [event.plan for event in engine.step() if isinstance(event, TokenProduced)]
        if len(plans) > 1:
            num_together += 1
            assert Action.SKIP not in b"".join(plans)
            assert len(set(plans)) == 1
    assert num_together > 1


@pytest.mark.parametrize("action", [Action.INT4, Action.INT8, Action.FULL])
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_the_output_of_native_code_is_the_same_to_the_bit(
    small_model: SmallModel, native_library: NativeLibrary, action: Action, temperature: float
) -> None:
    decoder = native_decoder(small_model.folder, native_library, shares_heads=True)
    file, vocab_size = small_model.folder / "tokenizer.json", decoder.config.vocab_size
    compiler = ConstraintCompiler(file, vocab_size, decoder.config.eos_token_ids, executor=AtOnce())
    rows = (1, 8), dict.fromkeys(ALL_ACTIONS, (1.0, 1.2))
    outputs = []
    for planner in (GroupPlanner(LatencyTable(*rows)), None):
        catalog = PolicyCatalog(some_costs(), ALL_ACTIONS, some_affine(decoder), ())
        engine = assemble_engine(decoder, catalog, EngineConfig(), 512, planner=planner, constraints=compiler)
        skip = SkipOptions(Mode.FIXED, fixed_action=action)
        sampling = SamplingParameters(temperature=temperature, seed=4)
        events, num_steps = run_alone(engine, request("r", "full", skip=skip, sampling=sampling, logprobs=3))
        assert (num_steps < len(tokens(events))) is (planner is not None)
        outputs.append([(own.token_id, own.logprobs) for own in events if isinstance(own, TokenProduced)])
    assert outputs[0] == outputs[1]


class Fake:
    """A constraint that forces the same text for ever."""

    def forced(self, count: int) -> list[int]:
        return [7, 8, 9][:count]


CHEAP_ROWS = LatencyTable((1, 4, 32), {Action.FULL: (1.0, 1.6, 8.0)})


def test_wrong_guesses_end_and_are_tried_again_later() -> None:
    guesses, output = Guesses(PassSeconds(CHEAP_ROWS, [Action.FULL]), Fake()), [1]
    assert guesses.wanted(output, 3, 1).token_ids == [7, 8]  # the pass puts out one more
    assert guesses.wanted(output, 1, 1).token_ids == []
    numbers = list[int]()
    while num_guesses := len(guesses.wanted_alone(output, 100)):
        guesses.checked(num_guesses, 0)
        output.append(1)
        numbers.append(num_guesses)
        assert len(numbers) < 40
    assert numbers == sorted(numbers, reverse=True)  # one, which costs a fifth of a pass, is tried longer than three
    assert numbers.count(3) < 12
    output += [1] * 400
    assert guesses.wanted_alone(output, 100)


def test_wrong_guesses_are_forgotten_among_others_too() -> None:
    dear = LatencyTable((1, 2, 64), {Action.FULL: (1.0, 1.6, 32.0)})
    guesses, output = Guesses(PassSeconds(dear, [Action.FULL]), Fake(), [1, 2], 300), [1]
    assert not guesses.seconds.text_may_pay(2)
    (before, *_) = guesses.wanted(output, 100, 2).chances
    for _ in range(10):
        guesses.wanted(output, 100, 2)
        guesses.checked(3, 0)
        output.append(1)
    (after, *_) = guesses.wanted(output, 100, 2).chances
    assert after < before / 2
    output += [1] * 200
    assert guesses.wanted(output, 100, 2).chances[0] > (before + after) / 2
    # Nothing looked its text up so far; alone, all of it is there.
    assert guesses.wanted_in_burst(output)[0] is not None or guesses.wanted(output, 50, 1).token_ids


def test_right_guesses_go_on() -> None:
    guesses, output = Guesses(PassSeconds(CHEAP_ROWS, [Action.FULL]), Fake()), [1]
    for _ in range(50):
        assert guesses.wanted_alone(output, 100) == [7, 8, 9]
        guesses.checked(3, 3)
        output += [7, 8, 9, 1]


def test_the_guesses_of_many_are_as_many_as_pay_together_the_surest_first() -> None:
    seconds = PassSeconds(LatencyTable((1, 4, 8, 64), {Action.FULL: (1.0, 1.0, 1.1, 50.0)}), [Action.FULL])
    assert seconds.numbers_that_pay({0: [0.5, 0.4], 1: [0.9, 0.8], 2: [0.9]}, 3) == {1: 2, 2: 1, 0: 2}
    assert seconds.numbers_that_pay({0: [0.01], 1: [0.9, 0.8], 2: [0.9]}, 3) == {1: 2, 2: 1}
    assert not seconds.numbers_that_pay({0: [0.5, 0.4], 1: [0.9, 0.8]}, 8)
    assert not seconds.numbers_that_pay({}, 3)
    assert [seconds.may_pay(count) for count in (1, 8)] == [True, False]  # in eight rows, in 64
    assert [seconds.text_may_pay(count) for count in (4, 8)] == [True, False]  # in up to 8 rows, in up to 16


def test_guesses_have_to_beat_what_skips_save() -> None:
    table = LatencyTable((1, 2, 8), {Action.FULL: (1.0, 1.1, 2.0)})
    assert PassSeconds(table, [Action.FULL]).numbers_that_pay({0: [0.3]}, 1) == {0: 1}
    assert not PassSeconds(table, [Action.FULL], saved=lambda num_rows: 0.3).numbers_that_pay({0: [0.3]}, 1)


def test_the_seconds_of_a_pass_are_those_of_its_plan() -> None:
    table = LatencyTable((1, 2, 8), {Action.INT4: (1.0, 1.5, 4.0), Action.FULL: (2.0, 2.2, 3.0)})
    seconds = PassSeconds(table, [Action.INT4, Action.FULL, Action.INT4])
    assert [seconds.of(1), seconds.of(2), seconds.of(8)] == pytest.approx([4.0, 5.2, 11.0])
    assert Guesses(seconds, Fake()).cost(7) == pytest.approx(11 / 4)
    assert PassSeconds(table, [Action.INT4], beside=0.5).of(8) == pytest.approx(4.5)
