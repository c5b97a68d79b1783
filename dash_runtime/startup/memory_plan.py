"""Says what memory a model will need, part by part, before any of it is loaded.

Knows configurations and shapes; reads no weights.
"""

from collections.abc import Sequence
from functools import partial

import torch

from dash_runtime.actions import Action
from dash_runtime.config import EngineConfig
from dash_runtime.devices import Device, device_of
from dash_runtime.errors import ConfigError
from dash_runtime.layers.kv_cache import BLOCK_TOKENS, pool_tokens, rounded_block_bytes
from dash_runtime.linears.quantization import BITS, BYTES_BESIDE_INT4, bytes_per_weight, layer_bytes_per_weight
from dash_runtime.model_config import ModelConfig
from dash_runtime.policy.learned import LearnedPolicy, shared_head_map
from dash_runtime.policy.network import PolicyNetwork
from dash_runtime.progress import Progress
from dash_runtime.startup.placement import CACHE, COMPENSATION, WORK, Bytes, ModelBytes, Room, place_layers

_WORK_BYTES = 512 * 1024 * 1024
"""Results between a pass's operations, CUDA graphs and the libraries' own memory, roughly. Not measured on a GPU."""
_QUANTISING_BYTES = 8
"""Per weight of a matrix: it is there twice in 32 bits."""


def model_bytes(
    model: ModelConfig,
    actions: Sequence[Action],
    dtype: torch.dtype,
    context_length: int,
    config: EngineConfig,
    learned: Sequence[LearnedPolicy],
    device: Device,
    is_native: bool | None = None,
) -> ModelBytes:
    """Returns the memory that the model's parts need on devices like `device`.

    Vectors, such as norms and biases, are left out. On a CPU it is the least that layers need: eager ones keep some
    matrices in a second form. Native code reads what was packed, and of the embedding some rows.

    Args:
        is_native: whether native code runs there; None: if it runs on such devices.
    """
    has_all = device.runs_native_code if is_native is None else is_native
    form = partial(bytes_per_weight, dtype=dtype, is_native=has_all)
    per_weight = {action: form(action) for action in actions if action is not Action.SKIP}
    # INT4 and INT3 may leave keys and values in INT8.
    in_layers = {action: layer_bytes_per_weight(action, dtype, is_native=has_all) for action in per_weight}
    of_keys = dict(per_weight) | dict.fromkeys(BITS, form(Action.INT8))
    if has_all and {Action.INT8, Action.INT4} <= set(per_weight):  # keys and values are shared whole
        in_layers[Action.INT8], of_keys[Action.INT8] = BYTES_BESIDE_INT4, 0
    quantised = [action for action in per_weight if action is not Action.FULL]
    key_value_weights = 2 * model.num_kv_heads * model.head_dim * model.hidden_size
    pool = pool_tokens(config.cache_tokens, config.num_slots)
    positions = pool + config.prefix_cache_tokens
    fitted = 2 * model.hidden_size * dtype.itemsize  # the one for plans without a file is affine
    own_tensors = [tensor for policy in learned for tensor in policy.compensation.tensors().values()]
    cache = positions * 2 * model.num_kv_heads * model.head_dim * dtype.itemsize
    if quantised and has_all:
        cache += pool // BLOCK_TOKENS * rounded_block_bytes(model)
    compensation = fitted + sum(tensor[0].nbytes for tensor in own_tensors)

    def layer_bytes(layer: int) -> Bytes:
        needs = Bytes({CACHE: cache, COMPENSATION: compensation})
        for action, size in in_layers.items():
            # Skipped rows have keys and values by a matrix of their own, except in native code and where it is a view.
            has_copy = action in quantised and not has_all
            finer = (of_keys[action] - size) * key_value_weights * (1 + has_copy)
            needs[action.name] = round(size * (model.num_weights(layer) + has_copy * key_value_weights) + finer)
        return needs

    head_weights = model.vocab_size * model.hidden_size
    # Only native code has an INT4 head and a narrow one.
    heads: dict[Action, float] = {
        action: size * head_weights
        for action, size in per_weight.items()
        if action is not Action.INT3 and (action is not Action.INT4 or has_all)
    }
    if has_all and Action.FULL not in heads:
        heads[Action.INT8] = head_weights
    if has_all and (head_map := shared_head_map(learned)) is not None:
        rough = form(Action.INT4) * model.vocab_size * head_map.rank
        heads[Action.SKIP] = form(Action.INT8) * head_weights + rough
    networks = sum(getattr(policy.network, name).nbytes for policy in learned for name in PolicyNetwork.__slots__)
    rotary = 2 * len(set(model.ropes)) * context_length * model.head_dim * dtype.itemsize
    largest = max(outputs * inputs for outputs, inputs in model.matrices())
    return ModelBytes(
        layers=[layer_bytes(layer) for layer in range(model.num_layers)],
        embedding=Bytes({} if has_all else {Action.FULL.name: head_weights * dtype.itemsize}),
        head=Bytes({action.name: round(size) for action, size in heads.items()}),
        is_tied=model.has_tied_head,
        each_device=Bytes({COMPENSATION: networks, WORK: _WORK_BYTES + rotary}),
        layer_loading=_QUANTISING_BYTES * largest if quantised else 0,
        head_loading=_QUANTISING_BYTES * head_weights if Action.INT8 in quantised else 0,
    )


def free_rooms(devices: Sequence[torch.device]) -> list[Room]:
    """Returns the memory that is free on each device now."""
    owns = [device_of(device) for device in devices]
    return [Room(str(own.device), own.free_bytes(), own.fills_lazily) for own in owns]


def place_on(
    devices: Sequence[torch.device], needs: ModelBytes, rooms: Sequence[Room], progress: Progress
) -> list[torch.device]:
    """Returns the device of each layer; tells what each device is to hold.

    Raises:
        ConfigError: there are more devices than layers.
        NotEnoughMemory: the model does not fit.
    """
    if len(devices) > len(needs.layers):
        raise ConfigError("devices", f"names {len(devices)}, but the model has {len(needs.layers)} layers")
    places = place_layers(needs, rooms)
    for place in places:
        progress(str(place))
    return [device for device, place in zip(devices, places, strict=True) for _ in place.layers]
