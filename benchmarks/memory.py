"""Measures memory bandwidth and counts the bytes that a decoded token reads. Knows shapes; knows no speeds."""

import time

import torch

from dash_runtime.actions import Action
from dash_runtime.layers.shortlist import NUM_EXACT_TILES
from dash_runtime.linears.grouped_matrix import GROUP_SIZE, LANES
from dash_runtime.linears.quantization import bytes_per_weight, layer_bytes_per_weight
from dash_runtime.model_config import ModelConfig

_MEGABYTES = 256


class Bandwidth:
    """Reads a tensor larger than any cache, with torch's threads."""

    def __init__(self) -> None:
        self._numbers = torch.ones(_MEGABYTES * 1024 * 1024 // 4, dtype=torch.float32)

    def bytes_per_second(self) -> float:
        """Returns the better of two readings: disturbances only slow them down."""
        return max(self._read() for _ in range(2))

    def _read(self) -> float:
        started = time.perf_counter()
        self._numbers.sum()
        return self._numbers.nbytes / (time.perf_counter() - started)


def weight_bytes(model: ModelConfig, plan: bytes, head: Action) -> float:
    """Returns the bytes of matrices that a token with this plan (one action per layer) reads, the head's included.

    Leaves out norms, routers, the cache, and the keys and values of skipped layers.
    """
    of_layers = (layer_bytes(model, layer, Action(number)) for layer, number in enumerate(plan))
    return sum(of_layers) + head_bytes(model, head)


def layer_bytes(model: ModelConfig, layer: int, action: Action, *, is_native: bool = True) -> float:
    """Returns the bytes of the layer's matrices that a row reads; leaves out what `weight_bytes` does."""
    return model.num_weights_read(layer) * layer_bytes_per_weight(action, torch.bfloat16, is_native=is_native)


def key_value_bytes(model: ModelConfig, action: Action, *, is_native: bool = True) -> float:
    """Returns the bytes of the matrix that projects the keys and values of a row that skips, in that action's form."""
    num_weights = 2 * model.num_kv_heads * model.head_dim * model.hidden_size
    return num_weights * bytes_per_weight(action, torch.bfloat16, is_native=is_native)


def head_bytes(model: ModelConfig, precision: Action) -> float:
    """Returns the bytes that the head reads of its matrix; in INT4 of its rough one, with the inputs that this has
    again, and in FULL of the tiles that it computes again."""
    each, full = (bytes_per_weight(own, torch.bfloat16, is_native=True) for own in (precision, Action.FULL))
    num_weights = model.hidden_size * model.vocab_size
    if precision is not Action.INT4:
        return num_weights * each
    exact = min(NUM_EXACT_TILES * LANES, model.vocab_size) * model.hidden_size * full
    return (num_weights + model.vocab_size * GROUP_SIZE) * each + exact
