"""Builds an engine that is ready to serve from a checkpoint folder: loads, calibrates, measures, warms up.

Fits and measurements are kept beside the converted models, and every later start reads them. So a plan drawn for a
budget is the same from one start to the next. Knows folders; knows no environment and no processes.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dash_runtime.actions import Action
from dash_runtime.checkpoints import cached_model_config, check_weights, open_weights, tokenizer_file
from dash_runtime.checkpoints.copied_weights import copied
from dash_runtime.config import EngineConfig, LaneKind
from dash_runtime.decoder.loading import make_decoder
from dash_runtime.devices import describe_devices, device_of, find_devices
from dash_runtime.devices.one_thread import one_thread
from dash_runtime.engine.engine import Engine
from dash_runtime.engine.lanes import check_lane
from dash_runtime.errors import ConfigError
from dash_runtime.layers.split_compensation import compensation_over
from dash_runtime.layers.weight_loader import WeightLoader
from dash_runtime.linears.kept_trials import KeptTrials
from dash_runtime.linears.quantization import precision_of_keys, supported_actions
from dash_runtime.linears.rounding_file import load_rounding, rounding_file
from dash_runtime.model_config import ModelConfig
from dash_runtime.native.levels import processor_features
from dash_runtime.policy.draft_length import LEAST_GAIN, MEASURED_LENGTHS
from dash_runtime.policy.learned import LearnedPolicy, shared_head_map
from dash_runtime.policy.model_sketch import kept_fingerprint
from dash_runtime.policy.policy_file import find_policies, load_policy
from dash_runtime.progress import Progress
from dash_runtime.startup.calibration import DeviceCalibration
from dash_runtime.startup.faster_kernels import actions_that_pay
from dash_runtime.startup.measured_engine import MeasuredOptions, measured_engine
from dash_runtime.startup.memory_plan import free_rooms, model_bytes, place_on
from dash_runtime.startup.native_code import NativeCode, native_code_for, native_decoder, with_native_code
from dash_runtime.startup.offer import asked_actions, fitting_actions, usual_actions
from dash_runtime.startup.packed_files import PackedFiles, WeightsPlace
from dash_runtime.startup.placement import ModelBytes
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
    actions: Sequence[Action] | None = None
    """The actions to offer; None: what fits well into the memory that is free."""
    weights: WeightsPlace = WeightsPlace.MAPPED
    """Where weights lie that native code reads."""
    native_code: NativeCode = NativeCode.AUTO
    """The origin of native code."""
    use_graphs: bool = True
    """True if decoding replays graphs on a device that has them."""
    checks_kept_costs: bool = True
    """True if kept tables are compared with what is measured, at the start and while the engine serves. Otherwise
    engines that share a cache folder plan alike, however busy the machine is."""
    measures_costs: bool = False
    """True if the cost table is measured even if one was kept."""
    serves_first: bool = False
    """True if what nobody measured before is measured once the engine serves, while it is idle (`Engine.later`)."""
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
    library, why_eager = None, "several devices share the layers"
    if len(devices) == 1:
        library, why_eager = native_code_for(
            model, context_length, dtype, device, cache_folder, progress, options.native_code
        )
    why_full = None if library is not None else why_eager
    with one_thread():
        supported = _eager_actions(devices, dtype, model) if library is None else tuple(Action)
        fingerprint = kept_fingerprint(model, weights, cache_folder / "fingerprints")
    rounding = load_rounding(rounding_file(cache_folder, fingerprint), fingerprint)
    has_int8_head = True
    if device_of(device).offers_only_faster:
        progress("timing kernels")
        supported, has_int8_head = actions_that_pay(model, supported, config.num_slots, device, dtype)
    finer_keys = precision_of_keys(supported)
    if rounding:
        rounded = " and ".join(action.name for action in rounding)
        progress(f"{rounded} weights were rounded by their inputs (dash-policy quantize)")
    described = describe_devices(devices)
    rooms = free_rooms(devices)
    shipped = find_policies(SHIPPED_POLICIES, fingerprint)
    policy_files = shipped if options.policy_file is None else [options.policy_file]
    loaded = [load_policy(own, model, fingerprint, dtype=dtype, device=device) for own in policy_files]
    if not loaded:
        progress(
            "no policy is known for this model: requests in ADAPTIVE get a fixed plan; `dash-policy make MODEL --out "
            "FOLDER` makes one, in about an hour for each half billion weights on two cores"
        )

    def needed(actions: tuple[Action, ...]) -> ModelBytes:
        return model_bytes(
            model, actions, dtype, context_length, config, loaded, device_of(device), library is not None
        )

    if options.actions is not None:
        actions = asked_actions(options.actions, supported, why_full)
    else:
        frees = [room.free for room in rooms if room.free is not None]
        free = sum(frees) if len(frees) == len(rooms) else None
        usual = usual_actions(supported, rounding)
        actions = fitting_actions(usual, lambda own: needed(own).weights, free, why_full, progress)
    learned = [own.without(set(Action) - set(actions)) for own in _usable(loaded, actions, rounding.identity, progress)]
    if options.policy_file is None:
        learned = suited(learned, LaneKind.CUDA_STREAM in device_of(device).lanes)
    layer_devices = place_on(devices, needed(actions), rooms, progress)
    learned = [replace(own, compensation=compensation_over(own.compensation, layer_devices)) for own in learned]
    progress(f"packing kernels for {', '.join(action.name for action in actions)} on {described}")
    has_graphs = options.use_graphs and device_of(device).has_graphs
    if library is not None:
        learned = [with_native_code(own, library, config.lane) for own in learned]
    weight_error = 0.0
    if library is None:
        weights = copied(weights, cache_folder / "copies", progress)
        decoder = make_decoder(
            *(model, weights, actions),
            dtype=dtype,
            device=layer_devices,
            context_length=context_length,
            finer_keys=finer_keys,
            rounding=rounding,
            trials=KeptTrials(cache_folder / "products"),
            has_int8_head=has_int8_head,
            has_graphs=has_graphs,
        )
    else:
        loader = WeightLoader(model, weights, dtype, device, finer_keys=finer_keys, rounding=rounding)
        key = fingerprint, rounding.identity, finer_keys is Action.INT8
        files = PackedFiles(cache_folder / "packed", key, loader, weights, shared_head_map(learned))
        decoder, packed = native_decoder(
            library,
            files,
            actions,
            context_length=context_length,
            place=options.weights,
            shares_heads=config.group_planner,
            progress=progress,
        )
        weight_error = packed.error(max(actions))
    weights.forget()
    learned = [own.for_heads(tuple(decoder.heads)) for own in learned]
    settle_memory(moves=library is None or options.weights is WeightsPlace.COPIED)  # before anything is measured
    kind = "eager" if library is None else f"native {library.name}, {processor_features()}"
    calibration = DeviceCalibration(
        cache_folder / "calibration",
        (fingerprint, options.precision),
        (described, kind, *(action.name for action in actions)),
        rounding.identity,
        checks_kept=options.checks_kept_costs,
    )
    return measured_engine(
        decoder,
        learned,
        calibration,
        config,
        MeasuredOptions(
            tokenizer_file(folder),
            context_length,
            layer_devices,
            max(MEASURED_LENGTHS) + 1 if library is None else _MOST_VERIFIED,
            has_graphs=has_graphs,
            has_native_code=library is not None,
            weight_error=weight_error,
            checks_kept_costs=options.checks_kept_costs,
            measures_costs=options.measures_costs,
            serves_first=options.serves_first,
            least_drafting_gain=options.least_drafting_gain,
        ),
        progress,
    )


def _usable(
    loaded: Sequence[LearnedPolicy], actions: Collection[Action], rounding: str | None, progress: Progress
) -> Iterator[LearnedPolicy]:
    """Yields the policies that need no other actions than these, and tells what the others need."""
    for policy in loaded:
        if policy.rounding != rounding:
            progress(
                f"policy {policy.name} was calibrated with other rounded weights than these (dash-policy quantize): it "
                "diverges less or more than it says"
            )
        if missing := policy.lacks(actions):
            names = ", ".join(action.name for action in sorted(missing))
            hint = ", whose weights `dash-policy quantize` makes" if Action.INT3 in missing else ""
            progress(f"policy {policy.name} is not offered: it needs {names}{hint}")
        else:
            yield policy


def suited(shipped: Sequence[LearnedPolicy], has_streams: bool) -> list[LearnedPolicy]:
    """Returns the policies that suit a device.

    One that decides further ahead diverges more, and hides its evaluation where that runs beside the layers. There it
    comes first; elsewhere it is left out.
    """
    if has_streams:
        return sorted(shipped, key=lambda policy: -policy.lookahead)
    return [policy for policy in shipped if policy.lookahead == 1]


def _eager_actions(devices: Sequence[torch.device], dtype: torch.dtype, model: ModelConfig) -> tuple[Action, ...]:
    """Returns the actions that all devices have kernels for, without native code. INT3 would run as INT4 does."""
    supported = [{*supported_actions(device, dtype, matrix_shapes(model))} - {Action.INT3} for device in devices]
    return tuple(sorted(set.intersection(*supported)))


def matrix_shapes(model: ModelConfig) -> set[tuple[int, int]]:
    """Returns `(out_features, in_features)` of the matrices that a quantised action needs kernels for."""
    matrices = {matrix for layer in range(model.num_layers) for matrix in model.matrices(layer)}
    return matrices | {(model.key_value_size, model.hidden_size)}
