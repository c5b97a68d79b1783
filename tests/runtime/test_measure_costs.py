"""Costs and latencies measured by whole steps, in the time allowed; a table that is replaced while requests run."""

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dash_runtime.actions import Action, CostTable, LatencyTable
from dash_runtime.config import (
    EngineConfig,
    GenerationRequest,
    Mode,
    SamplingParameters,
    SkipOptions,
    StoppingParameters,
)
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.engine.cost_fit import GROUP
from dash_runtime.engine.engine import Engine
from dash_runtime.engine.step_times import StepTime
from dash_runtime.events import CostStatus
from dash_runtime.layers.compensation import Identity
from dash_runtime.policy.catalog import PolicyCatalog
from dash_runtime.policy.plan_spec import PlanSpec
from dash_runtime.startup.measure import rounds_within
from dash_runtime.startup.measure_costs import StepMeasurement, measure_costs
from dash_runtime.startup.measure_latency import measure_latencies
from dash_runtime.startup.measured_engine import assemble_engine
from tests.runtime.support import ALL_ACTIONS, drain, finished, load_decoder, some_affine, some_costs, some_policy
from tests.tiny_models import save_tiny_model

INT4 = SkipOptions(Mode.FIXED, fixed_action=Action.INT4)


def ticking(seconds: float) -> Callable[[], float]:
    """Returns a clock that moves on by so much whenever it is read."""
    time = -seconds

    def now() -> float:
        nonlocal time
        time += seconds
        return time

    return now


def test_a_round_runs_every_action_and_head_in_groups(decoder: Decoder) -> None:
    (steps,) = StepMeasurement(decoder, some_affine(decoder)).rounds(1, math.inf)
    assert len(steps) % GROUP == 0
    assert all(
        len({step.source for step in steps[place : place + GROUP]}) == 1 for place in range(0, len(steps), GROUP)
    )
    assert {action for step in steps for action in step.plan} == set(ALL_ACTIONS)
    assert {step.head for step in steps} == set(decoder.heads)
    assert all(0 < step.seconds < 1 and not step.num_evaluations for step in steps)


def test_rounds_are_shuffled(decoder: Decoder) -> None:
    first, second = StepMeasurement(decoder, some_affine(decoder)).rounds(2, math.inf)
    uniform = [[step.source for step in own[::GROUP] if "mixture" not in step.source] for own in (first, second)]
    assert Counter(uniform[0]) == Counter(uniform[1])
    assert uniform[0] != uniform[1]


def test_a_policy_is_measured_beside_the_plan_that_it_chooses_and_no_plan_skips_all_layers(decoder: Decoder) -> None:
    """An evaluation is a small part of a token, and a model that skips everything writes what takes a head longer."""
    edges = dict.fromkeys((0, decoder.num_layers - 1), Action.INT4)
    spec = PlanSpec(ALL_ACTIONS, pinned=edges, lookahead=1, block_size=1, head=Action.FULL, costs=some_costs())
    compensation = some_affine(decoder)
    policy = some_policy(spec, decoder.config.hidden_size, (0.5, 0.0, 0.1), compensation=compensation)
    (steps,) = StepMeasurement(decoder, compensation, [policy]).rounds(1, math.inf)
    asked = {bytes(step.plan) for step in steps if step.num_evaluations}
    assert len(asked) == 1
    assert asked <= {bytes(step.plan) for step in steps if not step.num_evaluations}
    assert {step.num_evaluations for step in steps} == {0, policy.num_evaluations}
    assert all(bytes(step.plan) != bytes([Action.SKIP] * decoder.num_layers) for step in steps)


def test_a_measured_table_has_every_entry_and_its_spread(decoder: Decoder) -> None:
    measured = measure_costs(StepMeasurement(decoder, some_affine(decoder)), rounds=2)
    assert (set(measured.table.layer), set(measured.table.head)) == (set(ALL_ACTIONS), set(decoder.heads))
    assert measured.table.evaluation == 0
    assert all(0 < sd < 1 for sd in (*measured.spread.layer.values(), *measured.spread.head.values()))
    assert measured.num_rounds == 2


def test_a_disturbed_start_ends_by_its_deadline_with_what_it_has(decoder: Decoder) -> None:
    """Each step takes a second by this clock, thirty times a quiet machine's."""
    measurement = StepMeasurement(decoder, some_affine(decoder))
    now = ticking(1.0)
    few = measure_costs(measurement, seconds=30.0, now=now)
    assert now() < 50
    assert few.num_rounds < 2
    assert set(few.table.layer) == set(ALL_ACTIONS)
    many = measure_costs(measurement, rounds=3)
    assert few.spread.layer[Action.INT4] > many.spread.layer[Action.INT4]


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, [0, 1]), (1.0, list(range(13))), (0.04, [0, 1, 2, 3, 4])])
def test_rounds_end_with_the_time_but_one_counts(seconds: float, rounds: list[int]) -> None:
    assert list(rounds_within(seconds, 12, ticking(0.01))) == rounds


class Replacing:
    """A watch that replaces the catalog's table at its first step."""

    status = CostStatus()

    def __init__(self, catalog: PolicyCatalog, costs: CostTable) -> None:
        self.steps: list[StepTime] = []
        self._catalog = catalog
        self._costs = costs

    def observe(self, step: StepTime) -> None:
        self.steps.append(step)
        self._catalog.replace_costs(self._costs)

    def seconds_until_idle_work(self) -> float:
        return math.inf

    def work_idly(self) -> None:
        pass


def watched_engine(decoder: Decoder, costs: CostTable) -> tuple[Engine, Replacing]:
    config = EngineConfig(num_slots=2, cache_tokens=256)
    catalog = PolicyCatalog(some_costs(), ALL_ACTIONS, some_affine(decoder), ())
    watch = Replacing(catalog, costs)
    return assemble_engine(decoder, catalog, config, 512, frozenset(), cost_watch=watch), watch


def cheap_int4() -> CostTable:
    layer = {Action.SKIP: 0.1, Action.INT3: 0.18, Action.INT4: 0.2, Action.INT8: 0.6, Action.FULL: 1.0}
    return CostTable.from_seconds(6, layer, {Action.INT8: 1.0, Action.FULL: 2.0}, 0.2)


def test_a_running_request_keeps_the_table_that_it_began_with(decoder: Decoder) -> None:
    engine, watch = watched_engine(decoder, cheap_int4())
    plan = [Action.INT4] * 6
    for costs in (some_costs(), cheap_int4()):
        engine.submit(GenerationRequest("own", [1, 2, 3], StoppingParameters(12), skip=INT4))
        depth = finished(drain(engine)["own"]).depth
        assert depth.mean_cost == pytest.approx(costs.token_cost(plan, Action.INT8))
    assert {step.source for step in watch.steps} == {"fixed-int4"}
    assert len(watch.steps) == 2 * 10  # of 12 tokens the prompt made one, and the last has no next step


def test_only_steps_of_a_single_plain_row_are_timed(decoder: Decoder) -> None:
    engine, watch = watched_engine(decoder, some_costs())
    drawn = SamplingParameters(temperature=1.0)
    engine.submit(GenerationRequest("sampled", [1, 2], StoppingParameters(6), drawn))
    drain(engine)
    engine.submit(GenerationRequest("logprobs", [1, 2], StoppingParameters(6), logprobs=1))
    drain(engine)
    for name in ("one", "other"):
        engine.submit(GenerationRequest(name, [1, 2], StoppingParameters(6)))
    drain(engine)
    assert watch.steps == []


def measured(decoder: Decoder, rows: tuple[int, ...]) -> LatencyTable:
    return measure_latencies(decoder, Identity(), rows, rounds=2)


def test_every_action_takes_time_at_every_row_count(decoder: Decoder) -> None:
    costs = measure_latencies(decoder, some_affine(decoder), rounds=3)
    assert costs.rows == (1, 2, 4, 8, 16, 64)
    assert set(costs.seconds) == set(decoder.actions)
    assert all(0 < seconds < 1 for by_rows in costs.seconds.values() for seconds in by_rows)


def test_only_the_decoders_own_actions_are_measured(tiny_folder: Path) -> None:
    decoder = load_decoder(tiny_folder, actions=(Action.SKIP, Action.FULL))
    assert set(measured(decoder, (1, 3)).seconds) == {Action.SKIP, Action.FULL}


def test_a_model_with_a_short_context_and_many_layers_is_measured(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "short", "llama", max_position_embeddings=32, num_hidden_layers=11)
    decoder = load_decoder(folder, torch.bfloat16)
    assert all(seconds > 0 for by_rows in measured(decoder, (1, 2)).seconds.values() for seconds in by_rows)
