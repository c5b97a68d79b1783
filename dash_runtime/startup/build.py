"""Builds an engine that is ready to serve from a checkpoint folder: loads, calibrates, measures, warms up.

Fits and measurements are kept beside the converted models, and every later start reads them. So a plan drawn for a
budget is the same from one start to the next. Knows folders; knows no environment and no processes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from dash_runtime.actions import Action
from dash_runtime.checkpoints import cached_model_config, check_weights, open_weights, tokenizer_file
from dash_runtime.config import (
    EngineConfig,
    GenerationRequest,
    LaneKind,
    Mode,
    SkipOptions,
    StoppingParameters,
)
from dash_runtime.decoder.backends.native import NativeBackend
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.decoder.loading import make_decoder
from dash_runtime.devices import describe_devices, device_of, find_devices
from dash_runtime.devices.one_thread import one_thread
from dash_runtime.engine.constraints import ConstraintCompiler
from dash_runtime.engine.cost_fit import MeasuredCosts
from dash_runtime.engine.engine import Engine
from dash_runtime.engine.lanes import check_lane, make_lane
from dash_runtime.engine.planner import GroupPlanner, HighestAction
from dash_runtime.engine.step_times import CostWatch
from dash_runtime.errors import ConfigError
from dash_runtime.layers.split_compensation import compensation_over
from dash_runtime.linears.dense_linear import most_rows_apart
from dash_runtime.linears.int4_file import int4_file, load_int4
from dash_runtime.linears.kept_trials import KeptTrials
from dash_runtime.linears.quantization import supported_actions
from dash_runtime.model_config import ModelConfig
from dash_runtime.native.levels import processor_features
from dash_runtime.passes import Planner
from dash_runtime.policy.catalog import PolicyCatalog
from dash_runtime.policy.draft_costs import RoundCosts
from dash_runtime.policy.draft_length import LEAST_GAIN, MEASURED_LENGTHS
from dash_runtime.policy.fixed_plans import MeasuredPlan
from dash_runtime.policy.learned import LearnedPolicy, shared_head_map
from dash_runtime.policy.model_sketch import model_fingerprint
from dash_runtime.policy.policy_file import find_policies, load_policy
from dash_runtime.progress import Progress
from dash_runtime.startup.calibration import DeviceCalibration
from dash_runtime.startup.cost_keeper import CostKeeper
from dash_runtime.startup.faster_kernels import faster_actions, product_seconds
from dash_runtime.startup.measure import ROUND_SIZES
from dash_runtime.startup.measure_costs import StepMeasurement, measure_costs
from dash_runtime.startup.memory_plan import free_rooms, model_bytes, place_on
from dash_runtime.startup.model_facts import model_facts
from dash_runtime.startup.native_code import native_code_for, with_native_code
from dash_runtime.startup.process_memory import settle_memory

_MOST_VERIFIED = 64
"""Rows of a verification that several sequences share, at most: what more take was not measured."""
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
SHIPPED_POLICIES = Path(__file__).parent.parent / "policies"
"""Policy files that come with the package, each for one model."""


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """The options of an engine."""

    devices: Sequence[str] = ("auto",)
    """`auto`, torch's name for a device, or several names: then each has some of the layers."""
    precision: str = "bfloat16"
    num_threads: int | None = None
    policy_file: Path | None = None
    """None: the shipped policies for this model, if any."""
    native_code: bool = True
    """True if decoding runs native code, provided that this machine can compile it."""
    use_graphs: bool = True
    """True if decoding replays graphs on a device that has them."""
    checks_kept_costs: bool = True
    """True if kept tables are compared with what is measured, at the start and while the engine serves. Otherwise
    engines that share a cache folder plan alike, however busy the machine is."""
    measures_costs: bool = False
    """True if the cost table is measured even if one was kept."""
    least_drafting_gain: float = LEAST_GAIN
    """The least expected speed, as a multiple of full depth's, at which a lone sequence drafts; 0: it always does."""


def build_engine(
    folder: Path, cache_folder: Path, options: BuildOptions, config: EngineConfig, progress: Progress
) -> Engine:
    """Builds an engine for the checkpoint in `folder`, keeping calibrations in `cache_folder`.

    Raises:
        DashRuntimeError: the model, the policy file or an option cannot be used; the message says why.
    """
    devices = find_devices(options.devices)
    device = devices[0]
    check_lane(config.lane, *map(device_of, devices))
    if options.precision not in DTYPES:
        raise ConfigError("precision", f"must be one of {', '.join(DTYPES)}, got {options.precision!r}")
    if options.num_threads is not None:
        torch.set_num_threads(options.num_threads)
    dtype = DTYPES[options.precision]
    model = cached_model_config(folder, cache_folder)
    weights = open_weights(folder)
    check_weights(weights, model)
    context_length = min(model.context_length, config.context_length or model.context_length)
    with one_thread():
        actions = _common_actions(devices, dtype, model)
        fingerprint = model_fingerprint(model, weights)
    int4 = load_int4(int4_file(cache_folder, fingerprint), fingerprint)
    has_int8_head, has_finer_keys = True, Action.INT8 in actions
    if device_of(device).offers_only_faster:
        progress("timing kernels")
        timed = partial(product_seconds, device=device, dtype=dtype)
        head = {(model.vocab_size, model.hidden_size)}
        has_int8_head = Action.INT8 in faster_actions((Action.INT8,), partial(timed, shapes=head))
        actions = faster_actions(actions, partial(timed, shapes=matrix_shapes(model)))
    if int4:
        progress("INT4 weights were rounded by their inputs (dash-policy quantize)")
    described = describe_devices(devices)
    rooms = free_rooms(devices)
    shipped = find_policies(SHIPPED_POLICIES, fingerprint)
    learned: list[LearnedPolicy] = []
    for policy_file in shipped if options.policy_file is None else [options.policy_file]:
        policy = load_policy(policy_file, model, fingerprint, dtype=dtype, device=device)
        if policy.int4 != int4.identity:
            progress(
                f"policy {policy.name} was calibrated with other INT4 weights: it diverges less or more than it says"
            )
        learned.append(policy.without(set(Action) - set(actions)))
    if options.policy_file is None:
        learned = suited(learned, LaneKind.CUDA_STREAM in device_of(device).lanes)
    needs = model_bytes(model, actions, dtype, context_length, config, learned, device_of(device))
    layer_devices = place_on(devices, needs, rooms, progress)
    learned = [replace(own, compensation=compensation_over(own.compensation, layer_devices)) for own in learned]
    progress(f"packing kernels for {', '.join(action.name for action in actions)} on {described}")
    library = None
    if options.native_code and len(devices) == 1:
        library = native_code_for(model, context_length, dtype, device, cache_folder, progress)
    has_graphs = options.use_graphs and device_of(device).has_graphs
    native = None
    if library is not None:
        native = NativeBackend(model, library, actions, torch.get_num_threads(), shares_products=config.group_planner)
        learned = [with_native_code(own, library, config.lane) for own in learned]
    make = partial(
        make_decoder,
        *(model, weights, actions),
        dtype=dtype,
        device=layer_devices,
        context_length=context_length,
        has_finer_keys=has_finer_keys,
        int4=int4,
        head_map=None if native is None else shared_head_map(learned),
        trials=KeptTrials(cache_folder / "products"),
    )
    decoder = make(native=native, has_int8_head=has_int8_head, has_graphs=has_graphs)
    learned = [own.for_heads(tuple(decoder.heads)) for own in learned]
    settle_memory()  # before anything is measured
    kind = "eager" if library is None else f"compiled {library.name}, {processor_features()}"
    calibration = DeviceCalibration(
        cache_folder / "calibration",
        (fingerprint, options.precision),
        (described, kind),
        int4.identity,
        checks_kept=options.checks_kept_costs,
    )
    compensation = compensation_over(calibration.compensation(decoder, tokenizer_file(folder), progress), layer_devices)
    measurement = StepMeasurement(decoder, compensation, learned)
    costs = calibration.costs(
        decoder.actions,
        tuple(decoder.heads),
        partial(measure_costs, measurement),
        progress,
        has_policy=bool(learned),
        measures_again=options.measures_costs,
    )
    plans: Sequence[MeasuredPlan] = ()
    if not any(policy.plans for policy in learned if not policy.is_drafter):

        def eager_decoder() -> Decoder:
            return decoder if native is None else make(has_int4_head=Action.INT4 in decoder.heads)

        plans = calibration.plans(actions, eager_decoder, tokenizer_file(folder), costs.table, compensation, progress)
    verification_costs = calibration.verification_costs(decoder, progress)
    catalog = PolicyCatalog(
        costs.table,
        actions,
        compensation,
        learned,
        config.default_compute_budget,
        verification_costs,
        options.least_drafting_gain,
        plans,
        calibration.second_row(decoder, progress),
    )
    planner: Planner | None = None
    if config.group_planner and config.num_slots > 1:
        planner = (
            HighestAction() if has_graphs else GroupPlanner(calibration.latencies(decoder, compensation, progress))
        )
    counts = tuple(count for count in ROUND_SIZES if count <= (1 if has_graphs else config.num_slots))
    round_costs = RoundCosts(
        calibration.round_seconds(decoder, counts, progress),
        catalog.usual_draft_cost,
        verification_costs,
        # More rows would share products whose rounding depends on their number; where layers run eagerly all do.
        max(MEASURED_LENGTHS) + 1 if native is None else min(_MOST_VERIFIED, most_rows_apart()),
    )

    def replace_costs(replaced: MeasuredCosts) -> None:
        catalog.replace_costs(replaced.table)
        engine.facts = replace(engine.facts, policies=catalog.facts())
        calibration.keep_costs(replaced)

    keeper = CostKeeper(costs, measurement, replace_costs, progress) if options.checks_kept_costs else None
    constraints = ConstraintCompiler(tokenizer_file(folder), model.vocab_size, model.eos_token_ids)
    engine = assemble_engine(
        decoder,
        catalog,
        config,
        context_length,
        planner=planner,
        cost_watch=keeper,
        constraints=constraints,
        round_costs=round_costs,
    )
    if has_graphs:
        progress("capturing graphs")
        engine.prepare_graphs(catalog.assign(SkipOptions(Mode.ADAPTIVE)).policy)
    engine.facts = replace(engine.facts, has_native_code=native is not None)
    _warm_up(engine)
    return engine


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
) -> Engine:
    """Returns an engine over a decoder that was made for `context_length` positions.

    Sequences end at `eos_token_ids`; None means the model's own.
    """
    facts = model_facts(decoder, config, catalog.facts(), context_length, eos_token_ids)
    lane = make_lane(config.lane, *decoder.placed_on, static_input=decoder.static_input)
    return Engine(decoder, catalog, lane, facts, config, planner, cost_watch, constraints, round_costs)


def suited(shipped: Sequence[LearnedPolicy], has_streams: bool) -> list[LearnedPolicy]:
    """Returns the policies that suit a device.

    One that decides further ahead diverges more, and hides its evaluation where that runs beside the layers. There it
    comes first; elsewhere it is left out.
    """
    if has_streams:
        return sorted(shipped, key=lambda policy: -policy.lookahead)
    return [policy for policy in shipped if policy.lookahead == 1]


def _common_actions(devices: Sequence[torch.device], dtype: torch.dtype, model: ModelConfig) -> tuple[Action, ...]:
    """Returns the actions that all devices have kernels for."""
    supported = [supported_actions(device, dtype, matrix_shapes(model)) for device in devices]
    return tuple(action for action in supported[0] if all(action in own for own in supported))


def matrix_shapes(model: ModelConfig) -> set[tuple[int, int]]:
    """Returns `(out_features, in_features)` of the matrices that a quantised action needs kernels for."""
    matrices = {matrix for layer in range(model.num_layers) for matrix in model.matrices(layer)}
    return matrices | {(model.key_value_size, model.hidden_size)}


def _warm_up(engine: Engine) -> None:
    """Runs every mode once, so that the first request pays for no lazy initialisation."""
    room = min(engine.facts.context_length, engine.facts.cache_tokens)
    stopping = StoppingParameters(max(1, min(4, room - 1)), ignore_eos=True)
    options = [SkipOptions(Mode.FULL_DEPTH), SkipOptions(Mode.ADAPTIVE), SkipOptions(Mode.EXACT)]
    options += [SkipOptions(Mode.FIXED, fixed_action=action) for action in engine.facts.actions]
    for number, skip in enumerate(options):
        engine.submit(GenerationRequest(f"warm-up-{number}", [0], stopping, skip=skip))
        while engine.has_work:
            engine.step()
