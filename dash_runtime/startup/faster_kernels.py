"""Leaves out rounded kernels that do not pay beside FULL's, on a device where that can happen.

CUDA's INT8 product, say, may take longer than its bf16 one. Knows matrices and a clock; knows no layers.
"""

import statistics
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.devices import device_of
from dash_runtime.linears.dense_linear import FullLinear, Linear
from dash_runtime.linears.quantization import make_linear, precision_of_keys
from dash_runtime.model_config import ModelConfig

MakeMatrices = Callable[[], Sequence[FullLinear]]
Seconds = Callable[[Action, int], float]
"""Returns the seconds of an action's products with so many rows."""
_NUM_ROWS = (1, 16, 32)
_MARGIN = 0.1
_COLD_BYTES = 256 * 1024 * 1024
"""More than a device's caches hold. In a model, a matrix is read once a token."""
_MAX_COPIES = 64
_ROUNDS = 9


def actions_that_pay(
    model: ModelConfig,
    supported: Collection[Action],
    max_rows: int,
    device: torch.device,
    dtype: torch.dtype,
    measure: Callable[[MakeMatrices, Action, int], float] | None = None,
) -> tuple[tuple[Action, ...], bool]:
    """Returns the actions whose kernels pay in the model's layers, and whether INT8's pays in its head.

    INT4 is timed with its keys and values as they will be, so it comes after INT8 (`precision_of_keys`).

    Args:
        max_rows: the most rows of a decoding pass.
        measure: None: `product_seconds`.
    """
    measure = measure or product_seconds
    counts = sorted({min(count, max_rows) for count in _NUM_ROWS})

    def head() -> Sequence[FullLinear]:
        return [_random_matrix((model.vocab_size, model.hidden_size), device, dtype)]

    offered = set(supported)
    for action in (Action.INT8, Action.INT4):
        make = partial(_random_layers, model, precision_of_keys(offered), device, dtype)
        if action in offered and not pays(action, partial(measure, make), counts):
            offered.remove(action)
    has_int8_head = Action.INT8 in supported and pays(Action.INT8, partial(measure, head), counts)
    return tuple(sorted(offered)), has_int8_head


def pays(action: Action, seconds: Seconds, num_rows: Sequence[int]) -> bool:
    """Returns True if an action's products take a tenth less than FULL's with the fewest rows, for which plans are
    made, and with more rows at most a tenth more."""
    few, *more = num_rows
    if seconds(action, few) > (1 - _MARGIN) * seconds(Action.FULL, few):
        return False
    return all(seconds(action, count) <= (1 + _MARGIN) * seconds(Action.FULL, count) for count in more)


@torch.inference_mode()
def product_seconds(make: MakeMatrices, action: Action, num_rows: int) -> float:
    """Returns the seconds of an action's products of so many rows with matrices, each out of the caches.

    Args:
        make: makes the matrices anew: with a few of them, several copies keep each out of the caches.
    """
    calls: list[tuple[Linear, Tensor]] = []
    num_bytes = sum(full.weight.nbytes for full in make())
    for _ in range(min(_MAX_COPIES, -(-_COLD_BYTES // num_bytes))):
        for full in make():
            calls.append((make_linear(action, full), full.weight[:1].expand(num_rows, -1).contiguous()))
    device = device_of(calls[0][1].device)

    def run() -> None:
        for linear, rows in calls:
            linear(rows)

    replay = device.make_capture()(run) if device.has_graphs else run
    times: list[float] = []
    for _ in range(_ROUNDS):
        device.synchronise()
        started = time.perf_counter()
        replay()
        device.synchronise()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def _random_layers(
    model: ModelConfig, finer_keys: Action, device: torch.device, dtype: torch.dtype
) -> Sequence[FullLinear]:
    """Returns the matrices of a layer, and of one more for each other size of them, as they are loaded."""
    block, layers = model.block, dict.fromkeys(map(model.matrices, range(model.num_layers)))
    has_bias = block.has_qkv_bias, block.has_output_bias, block.has_mlp_bias, block.has_mlp_bias
    made: list[FullLinear] = []
    for shapes in layers:
        first, *others = (
            _random_matrix(shape, device, dtype, own) for shape, own in zip(shapes, has_bias, strict=True)
        )
        made += [replace(first, keys_from=model.query_size, finer_keys=finer_keys), *others]
    return made


def _random_matrix(
    shape: tuple[int, int], device: torch.device, dtype: torch.dtype, has_bias: bool = False
) -> FullLinear:
    weight = torch.randn(shape, device=device, dtype=dtype)
    return FullLinear(weight, torch.zeros(shape[0], device=device, dtype=dtype) if has_bias else None)
