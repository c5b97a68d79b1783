"""Makes an engine from a decoder: with what was measured on this device, at once or once it serves.

Fits and measurements are kept beside the converted models, and every later start reads them. So a plan drawn for a
budget is the same from one start to the next. Knows decoders and calibrations; knows no weights and no files.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dash_runtime.actions import LatencyTable
from dash_runtime.config import EngineConfig, GenerationRequest, Mode, SkipOptions, StoppingParameters
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.devices.cuda_graphs import collected_garbage
from dash_runtime.engine.constraints import ConstraintCompiler
from dash_runtime.engine.cost_fit import MeasuredCosts
from dash_runtime.engine.engine import Engine
from dash_runtime.engine.lanes import make_lane
from dash_runtime.engine.later import LaterWork
from dash_runtime.engine.planner import GroupPlanner, HighestAction
from dash_runtime.engine.step_times import CostWatch
from dash_runtime.layers.compensation import Compensation, Identity
from dash_runtime.layers.split_compensation import compensation_over
from dash_runtime.passes import Planner
from dash_runtime.policy.catalog import USUAL_VERIFICATION_COSTS, PolicyCatalog
from dash_runtime.policy.draft_costs import RoundCosts
from dash_runtime.policy.draft_length import LEAST_GAIN, USUAL_SECOND_ROW
from dash_runtime.policy.learned import LearnedPolicy
from dash_runtime.progress import Progress
from dash_runtime.startup.calibration import DeviceCalibration
from dash_runtime.startup.cost_keeper import CostKeeper
from dash_runtime.startup.estimates import estimated_costs
from dash_runtime.startup.measure import ROUND_SIZES
from dash_runtime.startup.measure_costs import StepMeasurement, measure_costs
from dash_runtime.startup.measure_prompts import fastest_prefill, prefill_actions
from dash_runtime.startup.model_facts import model_facts


@dataclass(frozen=True, slots=True)
class MeasuredOptions:
    """How an engine is made of a decoder. The others are as in `BuildOptions`."""

    tokenizer: Path
    context_length: int
    layer_devices: Sequence[torch.device]
    most_verified: int
    """Rows that a verification of several sequences has at most."""
    has_graphs: bool = False
    has_native_code: bool = False
    weight_error: float = 0.0
    checks_kept_costs: bool = True
    measures_costs: bool = False
    serves_first: bool = False
    least_drafting_gain: float = LEAST_GAIN


def measured_engine(
    decoder: Decoder,
    learned: Sequence[LearnedPolicy],
    calibration: DeviceCalibration,
    config: EngineConfig,
    options: MeasuredOptions,
    progress: Progress,
) -> Engine:
    """Returns an engine that is ready to serve.

    What nobody measured before has usual values or none: costs by the bytes that are read, skips without compensation,
    full depth where plans would have to be known, and no agreement between rows. It is measured before this returns,
    unless the engine is to serve first: then one piece after another, while it is idle.
    """
    tokenizer, later = options.tokenizer, LaterWork()
    patient = decoder.patient(later.pause) if options.serves_first else decoder
    over = partial(compensation_over, devices=options.layer_devices)
    fit = calibration.compensation(patient, tokenizer, progress)
    compensation: Compensation = Identity() if fit.kept is None else over(fit.kept)
    heads = tuple(decoder.heads)
    measurement = StepMeasurement(patient, compensation, learned)
    own_costs = calibration.costs(
        decoder.actions,
        heads,
        partial(measure_costs, measurement),
        progress,
        has_policy=bool(learned),
        measures_again=options.measures_costs,
    )
    costs = own_costs.kept or estimated_costs(decoder.config, decoder.actions, heads, bool(learned))
    verification = calibration.verification_costs(patient, progress)
    second_row = calibration.second_row(patient, progress)
    catalog = PolicyCatalog(
        costs.table,
        decoder.actions,
        compensation,
        learned,
        config.default_compute_budget,
        verification.kept or USUAL_VERIFICATION_COSTS,
        options.least_drafting_gain,
        (),
        USUAL_SECOND_ROW if second_row.kept is None else second_row.kept,
    )

    def replace_costs(replaced: MeasuredCosts) -> None:
        catalog.replace_costs(replaced.table)
        engine.facts = replace(engine.facts, policies=catalog.facts())
        calibration.keep_costs(replaced)

    keeper = CostKeeper(costs, measurement, replace_costs, progress) if options.checks_kept_costs else None
    engine = assemble_engine(
        decoder,
        catalog,
        config,
        options.context_length,
        cost_watch=keeper,
        constraints=ConstraintCompiler(tokenizer, decoder.config.vocab_size, decoder.config.eos_token_ids),
        later=later,
    )

    def fit_skips() -> None:
        nonlocal compensation
        compensation = over(fit.make())
        measurement.compensation = compensation
        learn(compensation=compensation)

    def measure_all_costs() -> None:
        nonlocal costs
        costs = own_costs.make()
        catalog.replace_costs(costs.table)
        if keeper is not None:
            keeper.begin_with(costs)
        learn()

    def learn(**found: Any) -> None:
        catalog.learn(**found)
        engine.facts = replace(engine.facts, policies=catalog.facts())

    if fit.kept is None:
        later.add(fit_skips)
    if own_costs.kept is None:
        later.add(measure_all_costs)
    if not any(policy.plans for policy in learned if not policy.is_drafter):
        plans = calibration.plans(patient, tokenizer, lambda: (costs.table, compensation), progress)
        if plans.kept is None:
            later.add(lambda: learn(plans=plans.make()))
        else:
            learn(plans=plans.kept)
    if verification.kept is None:
        later.add(lambda: learn(verification_costs=verification.make()))
    if second_row.kept is None:
        later.add(lambda: learn(second_row=second_row.make()))
    if config.rounds_prompts and len(prefill_actions(decoder)) > 1:
        prompts = calibration.prompt_seconds(patient, progress)
        if prompts.kept is None:
            later.add(lambda: learn(prefill_action=fastest_prefill(prompts.make())))
        else:
            learn(prefill_action=fastest_prefill(prompts.kept))
    if config.group_planner and config.num_slots > 1:
        if options.has_graphs:
            engine.learn(planner=HighestAction())
        else:
            _learn_planner(engine, calibration, patient, lambda: compensation, options, progress)
    counts = tuple(count for count in ROUND_SIZES if count <= (1 if options.has_graphs else config.num_slots))
    rounds = calibration.round_seconds(patient, counts, progress)

    def use_rounds(passes: Sequence[LatencyTable]) -> None:
        own = RoundCosts(passes, catalog.usual_draft_cost, catalog.verification_costs, options.most_verified)
        engine.learn(round_costs=own)

    if rounds.kept is None or verification.kept is None:
        later.add(lambda: use_rounds(rounds.get()))
    else:
        use_rounds(rounds.kept)
    if options.has_graphs or not options.serves_first:  # graphs are captured once, with what was measured
        later.finish()
    if options.has_graphs:
        progress("capturing graphs")
        usual = catalog.assign(SkipOptions(Mode.ADAPTIVE)).policy.compensation
        _capture_graphs(engine, usual, [compensation, *(own.compensation for own in learned)], learned)
    engine.facts = replace(engine.facts, has_native_code=options.has_native_code, weight_error=options.weight_error)
    _warm_up(engine)
    engine.may_capture = False
    return engine


def _capture_graphs(
    engine: Engine, usual: Compensation, others: Sequence[Compensation], learned: Sequence[LearnedPolicy]
) -> None:
    """Captures the graphs of short contexts with the usual compensation; once the engine is idle, those of decisions,
    other compensations and longer contexts."""
    work = engine.graph_work()
    if not work.contexts:
        return
    shortest, *longer = work.contexts
    with collected_garbage():
        for piece in work.layers(usual, shortest):
            piece()
    rest = {id(own): own for own in others if own is not usual}.values()
    for pieces in (
        *(work.decisions(policy) for policy in learned),
        *(work.layers(own, shortest) for own in rest),
        *(work.layers(own, context) for context in longer for own in (usual, *rest)),
    ):
        for piece in pieces:
            engine.later.add(piece)


def _learn_planner(
    engine: Engine,
    calibration: DeviceCalibration,
    patient: Decoder,
    compensation: Callable[[], Compensation],
    options: MeasuredOptions,
    progress: Progress,
) -> None:
    """Gives the engine a planner by kept latencies, which are compared with quick ones; or once they are measured."""
    latencies = calibration.latencies(patient, compensation, progress)
    kept = latencies.kept
    if kept is None:
        engine.later.add(lambda: engine.learn(planner=GroupPlanner(latencies.make())))
        return
    engine.learn(planner=GroupPlanner(kept))
    if options.checks_kept_costs:

        def check() -> None:
            engine.learn(planner=GroupPlanner(calibration.checked_latencies(kept, patient, compensation(), progress)))

        engine.later.add(check)


def assemble_engine(
    decoder: Decoder,
    catalog: PolicyCatalog,
    config: EngineConfig,
    context_length: int,
    eos_token_ids: frozenset[int] | None = None,
    planner: Planner | None = None,
    cost_watch: CostWatch | None = None,
    constraints: ConstraintCompiler | None = None,
    round_costs: RoundCosts | None = None,
    later: LaterWork | None = None,
) -> Engine:
    """Returns an engine over a decoder that was made for `context_length` positions.

    Sequences end at `eos_token_ids`; None means the model's own.
    """
    facts = model_facts(decoder, config, catalog.facts(), context_length, eos_token_ids)
    lane = make_lane(config.lane, *decoder.placed_on, graphs=decoder.graphs)
    return Engine(decoder, catalog, lane, facts, config, planner, cost_watch, constraints, round_costs, later)


def _warm_up(engine: Engine) -> None:
    """Runs every mode once, so that the first request pays for no lazy initialisation."""
    room = min(engine.facts.context_length, engine.facts.cache_tokens)
    stopping = StoppingParameters(max(1, min(2, room - 1)), ignore_eos=True)
    options = [engine.facts.deepest, SkipOptions(Mode.ADAPTIVE), SkipOptions(Mode.EXACT)]
    options += [SkipOptions(Mode.FIXED, fixed_action=action) for action in engine.facts.actions]
    for number, skip in enumerate(options):
        engine.submit(GenerationRequest(f"warm-up-{number}", [0], stopping, skip=skip))
        while engine.has_work:
            engine.step()
