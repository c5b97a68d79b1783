"""A checkpoint opened for training and evaluation, with its text. Knows files and decoders; knows no policies."""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from tokenizers import Tokenizer

from dash_runtime.actions import Action, CostTable
from dash_runtime.checkpoints import (
    cached_model_config,
    check_weights,
    load_tokenizer,
    open_weights,
    resolve_checkpoint,
    tokenizer_file,
)
from dash_runtime.checkpoints.chat_template import ChatTemplate
from dash_runtime.checkpoints.copied_weights import copied
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.decoder.loading import make_decoder
from dash_runtime.devices import find_device
from dash_runtime.errors import ConfigError
from dash_runtime.files.disk_cache import digest
from dash_runtime.layers.compensation import Compensation
from dash_runtime.layers.narrow_head import HeadMap
from dash_runtime.layers.weight_loader import LayerWeights, WeightLoader
from dash_runtime.linears.grouped_matrix import Rounding
from dash_runtime.linears.quantization import precision_of_keys, supported_actions
from dash_runtime.linears.rounding_file import load_rounding, rounding_file
from dash_runtime.policy.learned import LearnedPolicy, shared_head_map
from dash_runtime.policy.model_sketch import model_fingerprint
from dash_runtime.progress import Progress
from dash_runtime.startup.build import matrix_shapes
from dash_runtime.startup.measure_costs import StepMeasurement, measure_costs
from dash_runtime.startup.native_code import native_code_for, native_decoder, with_native_code
from dash_runtime.startup.offer import usual_actions
from dash_runtime.startup.packed_files import PackedFiles, WeightsPlace
from dash_runtime.training.data import file_token_sequences
from dash_runtime.training.dense_decoder import DenseDecoder
from dash_runtime.training.self_text import default_training_sequences

SEQUENCE_LENGTH = 128
MAX_SEQUENCES = 6000
_DEFAULT_SEQUENCES = 1200
"""Sequences of the default text, most of which the model has to write."""
_CONTEXT_LENGTH = 1024
_MEASURED_SECONDS = 60.0
"""For costs that a whole training or search rests on. A start has less time, and goes on while it serves."""


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """A checkpoint, its device and its text; `data` is None for the default text."""

    model: str
    revision: str | None
    device: str
    cache_folder: Path
    data: Path | None


@dataclass(frozen=True, slots=True)
class ServedDecoder:
    """A decoder as a server has it, and what makes of a policy the one that a server evaluates."""

    decoder: Decoder
    prepared: Callable[[LearnedPolicy], LearnedPolicy]


class LoadedModel:
    """Config, tokenizer and decoder of one checkpoint, in bfloat16.

    Args:
        actions: the actions to pack kernels for, FULL among them; None for all that the device has, without INT3 if
            nothing was rounded for it.

    Raises:
        ConfigError: an action has no kernel here, or the device does not exist.
        DashRuntimeError: the checkpoint cannot be used.
    """

    def __init__(self, options: ModelOptions, progress: Progress, actions: Sequence[Action] | None = None) -> None:
        self._options = options
        self._progress = progress
        self.folder = resolve_checkpoint(options.model, options.revision, options.cache_folder, progress)
        self.config = cached_model_config(self.folder, options.cache_folder)
        self._weights = copied(open_weights(self.folder), options.cache_folder / "copies", progress)
        check_weights(self._weights, self.config)
        self.device = find_device(options.device)
        self.supported = supported_actions(self.device, torch.bfloat16, matrix_shapes(self.config))
        self._finer_keys = precision_of_keys(self.supported)
        self.fingerprint = model_fingerprint(self.config, self._weights)
        self.rounding_file = rounding_file(options.cache_folder, self.fingerprint)
        self.rounding = load_rounding(self.rounding_file, self.fingerprint)
        wanted = usual_actions(self.supported, self.rounding) if actions is None else tuple(actions)
        if not set(wanted) <= set(self.supported):
            raise ConfigError("actions", f"must be among {', '.join(action.name for action in self.supported)}")
        self.context_length = min(_CONTEXT_LENGTH, self.config.context_length)
        self.actions = wanted
        self._head_map: HeadMap | None = None

    @cached_property
    def decoder(self) -> Decoder:
        return make_decoder(
            self.config,
            self._weights,
            self.actions,
            dtype=torch.bfloat16,
            device=self.device,
            context_length=self.context_length,
            has_int4_head=self.device.type == "cpu",
            finer_keys=self._finer_keys,
            rounding=self.rounding,
            head_map=self._head_map if self.device.type == "cpu" else None,
        )

    def with_head_map(self, head_map: HeadMap) -> "LoadedModel":
        """Returns the model with a narrow head, the one in SKIP."""
        other = copy(self)
        other._head_map = head_map
        other.__dict__.pop("decoder", None)  # made without it
        return other

    def with_head_of(self, policies: Sequence[LearnedPolicy]) -> "LoadedModel":
        """Returns the model with the narrow head that serves these policies, if one of them has one."""
        head_map = shared_head_map(policies)
        return self if head_map is None else self.with_head_map(head_map)

    def measured_costs(self, compensation: Compensation, learned: Sequence[LearnedPolicy] = ()) -> CostTable:
        """Returns what each action costs here: in native code, as a server runs it, or eagerly where there is none.

        Args:
            learned: as in `StepMeasurement`.
        """
        served = self.served_decoder()
        step = StepMeasurement(served.decoder, compensation, list(map(served.prepared, learned)))
        return measure_costs(step, seconds=_MEASURED_SECONDS).table

    def served_decoder(self) -> ServedDecoder:
        """Returns what a server runs: native code over packed weights, or `decoder` where there is none."""
        library, _ = native_code_for(
            self.config, self.context_length, torch.bfloat16, self.device, self._options.cache_folder, self._progress
        )
        if library is None:
            return ServedDecoder(self.decoder, lambda policy: policy)
        loader = self._loader(self.rounding)
        key = self.fingerprint, self.rounding.identity, self._finer_keys is Action.INT8
        files = PackedFiles(self._options.cache_folder / "packed", key, loader, self._weights, self._head_map)
        decoder, _ = native_decoder(
            library,
            files,
            self.actions,
            context_length=self.context_length,
            place=WeightsPlace.MAPPED,
            shares_heads=True,
            progress=self._progress,
        )
        return ServedDecoder(decoder, lambda policy: with_native_code(policy, library, None))

    def dense_decoder(self, actions: Sequence[Action] = ()) -> DenseDecoder:
        """Returns the same model for learning, with FULL and the kernels of these actions."""
        return DenseDecoder(
            self.config,
            self._weights,
            actions,
            device=self.device,
            finer_keys=self._finer_keys,
            rounding=self.rounding,
        )

    def layer_weights(self, layer: int) -> LayerWeights:
        """Returns one layer's weights, as `dense_decoder` has them before any rounding."""
        return self._loader({}).layer(layer)

    def _loader(self, rounding: Rounding) -> WeightLoader:
        return WeightLoader(
            self.config,
            self._weights,
            torch.bfloat16,
            self.device,
            finer_keys=self._finer_keys,
            rounding=rounding,
        )

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(tokenizer_file(self.folder))

    @cached_property
    def chat_template(self) -> ChatTemplate:
        return ChatTemplate.load(self.folder)

    def sequences(self, most: int = MAX_SEQUENCES) -> list[list[int]]:
        """Returns the chosen text as at most `most` sequences of `SEQUENCE_LENGTH` token ids.

        Raises:
            ConfigError: the text cannot be used.
        """
        tokenizer, data = tokenizer_file(self.folder), self._options.data
        if data is not None:
            return file_token_sequences(data, tokenizer, SEQUENCE_LENGTH, self.chat_template)[:most]
        return default_training_sequences(
            self.decoder,
            tokenizer,
            self.chat_template,
            self.config.eos_token_ids,
            min(most, _DEFAULT_SEQUENCES),
            SEQUENCE_LENGTH,
            self._options.cache_folder / "training" / f"self-text-{digest(self.fingerprint)}.safetensors",
            self._progress,
            fingerprint=self.fingerprint,
        )
