"""Makes a decoder and its backends from a checkpoint's tensors. Knows weights and devices; knows no files."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.decoder.backends.backend import Backend
from dash_runtime.decoder.backends.cuda import CudaBackend
from dash_runtime.decoder.backends.eager import EagerBackend
from dash_runtime.decoder.backends.loop import LoopEnds
from dash_runtime.decoder.backends.native import NativeBackend
from dash_runtime.decoder.backends.packed_model import PackedModel, pack_by_layer, parts_of
from dash_runtime.decoder.backends.split import backend_over
from dash_runtime.decoder.decoder import Backends, Decoder
from dash_runtime.devices import device_of
from dash_runtime.layers.batch import PassKind
from dash_runtime.layers.embedding import PlainEmbedding, make_embedding
from dash_runtime.layers.heads import Head, Heads, eager_head
from dash_runtime.layers.layer import DecoderLayer, make_layer
from dash_runtime.layers.narrow_head import HeadMap, narrow_head
from dash_runtime.layers.shortlist import int4_logits, loudest_channels, shortlist_head
from dash_runtime.layers.weight_loader import WeightLoader
from dash_runtime.linears.dense_linear import MAX_INVARIANT_ROWS, BatchInvariantLinear, FullLinear
from dash_runtime.linears.grouped_matrix import Rounding, is_packable, only
from dash_runtime.linears.kept_trials import NO_TRIALS, KeptTrials
from dash_runtime.linears.quantization import BITS, for_many_rows, make_linear
from dash_runtime.model_config import ModelConfig

_ROWS_IN_CACHE = 512
"""Prompt rows in a native pass: their states stay in the processor's cache."""


def make_decoder(
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    actions: tuple[Action, ...],
    *,
    dtype: torch.dtype,
    device: torch.device | Sequence[torch.device],
    context_length: int,
    has_graphs: bool = False,
    has_int8_head: bool = True,
    has_int4_head: bool = False,
    finer_keys: Action | None = Action.INT8,
    rounding: Rounding | None = None,
    head_map: HeadMap | None = None,
    trials: KeptTrials = NO_TRIALS,
) -> Decoder:
    """Packs a model for its devices.

    Args:
        weights: tensors by the names in `config.tensor_names`, in the shapes that `config` asks for.
        actions: the actions to pack kernels for, FULL among them.
        device: that of all layers, or one for each; then no device has two stretches of layers. The embedding lies
            with the first layer, the heads with the last.
        context_length: number of positions in the rotary tables.
        has_graphs: decoding replays graphs, which the devices have to be able to make (`Device.has_graphs`).
        has_int8_head: False if an INT8 head would be no faster than FULL's, which then runs in its place.
        has_int4_head: True for the INT4 head of native code without native code too, where it is no faster than FULL's:
            to judge plans that will run there.
        finer_keys, rounding: as in `WeightLoader`.
        head_map: that of the narrow head, the one in SKIP; None for no such head.
        trials: as in `BatchInvariantLinear`.
    """
    devices = [device] * config.num_layers if isinstance(device, torch.device) else list(device)
    finer_keys = None if BITS.keys().isdisjoint(actions) else finer_keys
    own_rounding = only(rounding or {}, actions)
    loaders = {
        own: WeightLoader(config, weights, dtype, own, finer_keys=finer_keys, rounding=own_rounding)
        for own in dict.fromkeys(devices)
    }
    layers: list[DecoderLayer] = []
    for index, own in enumerate(devices):
        layer_weights = loaders[own].layer(index)
        layers.append(make_layer(layer_weights, config.query_size, actions, trials))
    wide_layers = [layer.for_many_rows() for layer in layers]

    first, last = loaders[devices[0]], loaders[devices[-1]]
    final_norm = last.final_norm()
    embedding = first.embedding()
    is_shared = config.has_tied_head and first is last
    head = embedding if is_shared else last.embedding() if config.has_tied_head else last.head()
    full = make_linear(Action.FULL, FullLinear(head), trials)
    embed = make_embedding(embedding, full if is_shared else None, config.embedding_multiplier)
    multiplier, loudest = config.logits_multiplier, loudest_channels(layer_weights, final_norm)
    rounded = None
    if is_packable(*head.shape) and (head_map is not None or (has_int4_head and Action.INT4 in actions)):
        rounded = int4_logits(head, loudest)
    by_precision: dict[Action, Head] = {}
    wide_heads: dict[Action, Head] = {}
    for precision in actions:
        if precision in (Action.SKIP, Action.INT3):
            continue
        if precision is Action.INT4:
            if has_int4_head and rounded is not None:
                shortlisted = shortlist_head(rounded, for_many_rows(full), final_norm, multiplier)
                by_precision[precision] = wide_heads[precision] = shortlisted
            continue
        is_full = precision is Action.FULL or not has_int8_head
        linear = full if is_full else make_linear(precision, FullLinear(head))
        by_precision[precision] = eager_head(linear, final_norm, multiplier)
        wide_heads[precision] = eager_head(for_many_rows(linear), final_norm, multiplier)
    if head_map is not None and rounded is not None:
        from_narrow = narrow_head(head, rounded, for_many_rows(full), head_map, final_norm, multiplier)
        by_precision[Action.SKIP] = wide_heads[Action.SKIP] = from_narrow

    heads = Heads(by_precision)
    clock = device_of(devices[0] if len(loaders) == 1 else torch.device("cpu"))
    ends = LoopEnds(config.num_layers, embed, heads, clock)
    eager = EagerBackend(ends, config, wide_layers, Heads(wide_heads)), EagerBackend(ends, config, layers, heads)
    wide, narrow = (backend_over(ends, dict.fromkeys(loaders, backend), devices) for backend in eager)
    backends: Backends = {PassKind.PREFILL: [wide], PassKind.DECODE: [narrow], PassKind.VERIFY: [narrow]}
    if has_graphs:
        own_embed = embed if isinstance(embed, PlainEmbedding) else None
        replayed: dict[torch.device, Backend] = {
            own: CudaBackend(
                ends,
                config,
                layers,
                [layer for layer, device in enumerate(devices) if device == own],
                own_embed if own == devices[0] else None,
                by_precision if own == devices[-1] else {},
                eager[1],
                device_of(own),
                dtype,
            )
            for own in loaders
        }
        backends = {**backends, PassKind.DECODE: [backend_over(ends, replayed, devices), narrow]}
    is_invariant = isinstance(wide_layers[0].key_values[Action.FULL], BatchInvariantLinear)
    return Decoder(
        config,
        actions,
        backends,
        embed,
        by_precision,
        dtype=dtype,
        devices=devices,
        context_length=context_length,
        max_prompt_rows=MAX_INVARIANT_ROWS if is_invariant else device_of(devices[0]).row_block,
    )


def pack_in_memory(loader: WeightLoader, actions: Sequence[Action], head_map: HeadMap | None = None) -> PackedModel:
    """Packs what native code needs for some actions, without a file."""
    tensors: dict[str, Tensor] = {}
    for _ in pack_by_layer(loader, dict.fromkeys(parts_of(actions, head_map), tensors.__setitem__), head_map):
        pass
    return PackedModel(loader.config, tensors)


def make_native_decoder(
    config: ModelConfig,
    packed: PackedModel,
    native: NativeBackend,
    actions: tuple[Action, ...],
    *,
    context_length: int,
    head_map: HeadMap | None = None,
) -> Decoder:
    """Makes a decoder whose passes run in native code.

    Args:
        packed: the weights of these actions; see `parts_of`.
        native: the backend; it gets the weights.
        actions: those that the backend is for.
        context_length, head_map: as in `make_decoder`.
    """
    native.set_layers(packed)
    heads = native.heads.make(packed, config.logits_multiplier, head_map)
    embed = PlainEmbedding(packed.embedding, config.embedding_multiplier)
    device = packed.embedding.device
    native.set_ends(LoopEnds(config.num_layers, embed, Heads(heads), device_of(device)), embed, heads)
    return Decoder(
        config,
        actions,
        {kind: [native] for kind in PassKind},
        embed,
        heads,
        dtype=torch.bfloat16,
        devices=[device] * config.num_layers,
        context_length=context_length,
        max_prompt_rows=_ROWS_IN_CACHE,
        rows_are_apart=True,
        draw=native.draw,
    )
