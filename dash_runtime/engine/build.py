"""From a checkpoint folder to an engine that is ready to serve: load, calibrate, measure, warm up.

What was fitted and measured is kept beside the converted models, so that every later start reads it: a plan drawn for
a budget is then the same from one start to the next. Knows folders; knows no environment and no processes.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dash_runtime.actions import CostTable
from dash_runtime.checkpoints import check_weights, load_model_config, open_weights, tokenizer_file
from dash_runtime.config import (
    EngineConfig,
    GenerationRequest,
    Mode,
    ModelFacts,
    SkipOptions,
    StoppingParameters,
)
from dash_runtime.decoder.compensation import Compensation, make_compensation
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.decoder.measure import measure_costs
from dash_runtime.decoder.quantization import supported_actions
from dash_runtime.engine.engine import Engine
from dash_runtime.engine.lanes import make_lane
from dash_runtime.errors import ConfigError, DashRuntimeError
from dash_runtime.model_config import ModelConfig
from dash_runtime.policy.catalog import PolicyCatalog
from dash_runtime.policy.learned import LearnedPolicy
from dash_runtime.policy.policy_file import find_policies, load_policy, model_fingerprint
from dash_runtime.training.data import default_token_sequences
from dash_runtime.training.fit_compensation import NUM_SEQUENCES, SEQUENCE_LENGTH, fit_compensation
from dash_runtime.whole_file import replacing

Progress = Callable[[str], None]

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
SHIPPED_POLICIES = Path(__file__).parent.parent / "policies"
"""Policy files that come with the package, each for one model."""
_CALIBRATION_VERSION = 2


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """Where and how to run. `device` is `auto` or torch's name for one."""

    device: str = "auto"
    precision: str = "bfloat16"
    num_threads: int | None = None
    policy_file: Path | None = None
    """None: the shipped ones, where there are some for this model."""


def build_engine(
    folder: Path, cache_folder: Path, options: BuildOptions, config: EngineConfig, progress: Progress
) -> Engine:
    """Builds an engine for the checkpoint in `folder`, keeping calibrations in `cache_folder`.

    Raises:
        DashRuntimeError: the model, the policy file or an option cannot be used; the message says why.
    """
    device = find_device(options.device)
    if options.precision not in DTYPES:
        raise ConfigError("precision", f"must be one of {', '.join(DTYPES)}, got {options.precision!r}")
    if options.num_threads is not None:
        torch.set_num_threads(options.num_threads)
    dtype = DTYPES[options.precision]
    model = load_model_config(folder)
    weights = open_weights(folder)
    check_weights(weights, model)
    context_length = min(model.context_length, config.context_length or model.context_length)
    actions = supported_actions(device, dtype, matrix_shapes(model))
    progress(f"packing kernels for {', '.join(action.name for action in actions)} on {describe(device)}")
    decoder = Decoder(model, weights, actions, dtype=dtype, device=device, context_length=context_length)
    fingerprint = model_fingerprint(model, weights)
    shipped = find_policies(SHIPPED_POLICIES, fingerprint)
    learned: list[LearnedPolicy] = []
    for policy_file in shipped if options.policy_file is None else [options.policy_file]:
        policy = load_policy(policy_file, model, fingerprint, dtype=dtype, device=device)
        learned.append(policy.without(set(policy.actions) - set(actions)))
    calibration = _Calibration(cache_folder / "calibration", fingerprint, options.precision, device)
    compensation = calibration.compensation(decoder, tokenizer_file(folder), progress)
    costs = calibration.costs(decoder, compensation, progress)
    catalog = PolicyCatalog(costs, actions, compensation, learned, config.default_compute_budget)
    engine = assemble_engine(decoder, catalog, config, context_length)
    _warm_up(engine)
    return engine


def assemble_engine(
    decoder: Decoder,
    catalog: PolicyCatalog,
    config: EngineConfig,
    context_length: int,
    eos_token_ids: frozenset[int] | None = None,
) -> Engine:
    """An engine over a decoder that was made for `context_length` positions. Sequences end at `eos_token_ids`, the
    model's own where there are none."""
    model = decoder.config
    facts = ModelFacts(
        name=model.name,
        architecture=model.architecture,
        num_layers=model.num_layers,
        vocab_size=model.vocab_size,
        context_length=context_length,
        cache_tokens=config.cache_tokens,
        num_slots=config.num_slots,
        eos_token_ids=model.eos_token_ids if eos_token_ids is None else eos_token_ids,
        actions=decoder.actions,
        policies=catalog.facts(),
        device=describe(decoder.device),
    )
    return Engine(decoder, catalog, make_lane(config.lane, decoder.device), facts, config)


def find_device(name: str) -> torch.device:
    """The device called `name`; `auto` is CUDA where there is one.

    Raises:
        ConfigError: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError("device", f"{name!r} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def describe(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} ({device})"
    return f"{torch.backends.cpu.get_cpu_capability()} CPU, {torch.get_num_threads()} threads"


def matrix_shapes(model: ModelConfig) -> set[tuple[int, int]]:
    """`(out_features, in_features)` of the matrices that a quantised action needs kernels for."""
    query, key = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    return {
        (query + 2 * key, model.hidden_size),
        (model.hidden_size, query),
        (2 * model.intermediate_size, model.hidden_size),
        (model.hidden_size, model.intermediate_size),
    }


class _Calibration:
    """Compensation and costs of one model on one device, read where they were kept, made otherwise."""

    def __init__(self, folder: Path, fingerprint: str, precision: str, device: torch.device) -> None:
        key = (_CALIBRATION_VERSION, fingerprint, precision, torch.__version__)
        self._folder = folder
        self._compensation_file = folder / f"compensation-{_digest(key)}.safetensors"
        self._costs_file = folder / f"costs-{_digest((*key, describe(device)))}.json"

    def compensation(self, decoder: Decoder, tokenizer: Path, progress: Progress) -> Compensation:
        shape = (decoder.num_layers, decoder.config.hidden_size)
        try:
            kept = load_file(self._compensation_file)
            on_device = {name: t.to(decoder.device, decoder.dtype) for name, t in kept.items()}
            return make_compensation("affine", on_device, *shape)
        except (OSError, SafetensorError, DashRuntimeError):
            progress("fitting the compensation of skipped layers (kept for later starts)")
        length = min(SEQUENCE_LENGTH, decoder.config.context_length)
        affine = fit_compensation(decoder, default_token_sequences(tokenizer, NUM_SEQUENCES, length)).affine
        tensors = {name: tensor.cpu().contiguous() for name, tensor in affine.tensors().items()}
        self._write(self._compensation_file, lambda path: save_file(tensors, path))
        return affine

    def costs(self, decoder: Decoder, compensation: Compensation, progress: Progress) -> CostTable:
        try:
            kept = CostTable.from_json(json.loads(self._costs_file.read_text()))
            if set(kept.layer) == set(decoder.actions) and set(kept.head) == set(decoder.heads):
                return kept
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass  # not there, or damaged: measured again below
        progress("measuring what each action costs here (kept for later starts)")
        costs = measure_costs(decoder, compensation)
        self._write(self._costs_file, lambda path: path.write_text(json.dumps(costs.to_json(), indent=1)))
        return costs

    def _write(self, path: Path, write: Callable[[Path], object]) -> None:
        """In one rename; a folder that cannot be written to only costs the next start its time."""
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            with replacing(path) as partial:
                write(partial)


def _digest(key: object) -> str:
    return hashlib.sha256(repr(key).encode()).hexdigest()[:16]


def _warm_up(engine: Engine) -> None:
    """Runs every mode once, so that the first request pays for no lazy initialisation."""
    room = min(engine.facts.context_length, engine.facts.cache_tokens)
    stopping = StoppingParameters(max(1, min(4, room - 1)), ignore_eos=True)
    options = [SkipOptions(Mode.FULL_DEPTH), SkipOptions(Mode.ADAPTIVE)]
    options += [SkipOptions(Mode.FIXED, fixed_action=action) for action in engine.facts.actions]
    for number, skip in enumerate(options):
        engine.submit(GenerationRequest(f"warm-up-{number}", [0], stopping, skip=skip))
        while engine.has_work:
            engine.step()
