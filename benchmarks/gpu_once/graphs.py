"""The benchmark's only door to the CUDA backend: decoders with graphs and without, and what capturing took.

Knows which backends a decoder has; knows no models' shapes and no policies.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.decoder.backends.cuda import CudaBackend
from dash_runtime.decoder.backends.eager import EagerBackend
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.decoder.loading import make_decoder
from dash_runtime.devices import device_of
from dash_runtime.devices.cuda_graphs import CaptureFailed
from dash_runtime.engine.graph_work import GraphWork
from dash_runtime.engine.lanes import InlineLane
from dash_runtime.layers.batch import PassKind
from dash_runtime.layers.compensation import Compensation
from dash_runtime.layers.kv_cache import CachePool
from dash_runtime.layers.layer import DecoderLayer
from dash_runtime.model_config import ModelConfig


@dataclass(frozen=True, slots=True)
class Captured:
    """The number of prepared graphs, and the time and memory that they took."""

    num_graphs: int
    seconds: float
    num_bytes: float
    error: str | None
    """Why capturing failed."""


def decoder_with_graphs(
    config: ModelConfig, weights: Mapping[str, Tensor], actions: Sequence[Action], dtype: torch.dtype,
    device: torch.device, context_length: int,
) -> Decoder:  # fmt: skip
    """Returns a decoder that decodes with graphs where the device has them. INT8 has no head, and INT4 has its keys and
    values in FULL, where INT8's kernel may be slow."""
    has_fast_int8 = not device_of(device).offers_only_faster
    return make_decoder(
        config,
        weights,
        tuple(actions),
        dtype=dtype,
        device=device,
        context_length=context_length,
        has_graphs=device_of(device).has_graphs,
        has_int8_head=has_fast_int8,
        finer_keys=Action.INT8 if has_fast_int8 else Action.FULL,
    )


def eager_over(decoder: Decoder) -> Decoder:
    """Returns a decoder over the same layers that decodes eagerly."""
    backends = {**decoder.backends, PassKind.DECODE: [_eager_backend(decoder)]}
    return replace(decoder, backends=backends)


def layers_of(decoder: Decoder) -> Sequence[DecoderLayer]:
    """Returns the decoder's layers, packed for a few rows."""
    return _eager_backend(decoder)._layers


def has_graphs(decoder: Decoder) -> bool:
    """Returns True if decoding runs another backend than the eager one."""
    return decoder.backends[PassKind.DECODE][0] is not _eager_backend(decoder)


def prepare(decoder: Decoder, pool: CachePool, compensation: Compensation, num_rows: int) -> Captured:
    """Captures the layers' graphs for up to `num_rows` rows with short contexts."""
    backend = decoder.backends[PassKind.DECODE][0]
    started, before = time.perf_counter(), _reserved_bytes(decoder.device)
    error = None
    try:
        work = GraphWork(decoder, InlineLane(decoder.placed_on[0]), pool, num_rows, 1)
        for context in work.contexts:
            for piece in work.layers(compensation, context):
                piece()
        decoder.synchronise()
    except CaptureFailed as failure:
        error = str(failure)
    num_graphs = backend.num_graphs if isinstance(backend, CudaBackend) else 0
    seconds = time.perf_counter() - started
    return Captured(num_graphs, seconds, _reserved_bytes(decoder.device) - before, error)


def _eager_backend(decoder: Decoder) -> EagerBackend:
    own = decoder.backends[PassKind.DECODE]
    # The last backend takes every pass. With a single one for decoding, verification has the eager one.
    backend = own[-1] if len(own) > 1 else decoder.backends[PassKind.VERIFY][-1]
    assert isinstance(backend, EagerBackend), "a model on one device has an eager backend"
    return backend


def _reserved_bytes(device: torch.device) -> int:
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0
