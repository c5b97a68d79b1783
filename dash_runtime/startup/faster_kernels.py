"""Leaves out rounded kernels that are no faster than FULL's on a device where that can happen.

CUDA's INT8 product, say, may take longer than its bf16 one. Knows matrices and a clock; knows no layers.
"""

import statistics
import time
from collections.abc import Callable, Collection

import torch
from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.devices import device_of
from dash_runtime.linears.dense_linear import FullLinear, Linear
from dash_runtime.linears.quantization import make_linear

Shape = tuple[int, int]
"""`(out_features, in_features)`."""
_COLD_BYTES = 256 * 1024 * 1024
"""More than a device's caches hold. In a model, a matrix is read once a token."""
_MAX_COPIES = 64
_ROUNDS = 9


def faster_actions(actions: Collection[Action], seconds: Callable[[Action], float]) -> tuple[Action, ...]:
    """Returns the actions but those whose kernel takes at least as long as FULL's."""
    full = seconds(Action.FULL)
    return tuple(own for own in actions if own in (Action.SKIP, Action.FULL) or seconds(own) < full)


@torch.inference_mode()
def product_seconds(action: Action, shapes: Collection[Shape], device: torch.device, dtype: torch.dtype) -> float:
    """Returns what a row's products with matrices of these shapes take, each out of the caches, in seconds."""
    calls: list[tuple[Linear, Tensor]] = []
    for out_features, in_features in shapes:
        weight = torch.randn(out_features, in_features, device=device, dtype=dtype)
        row = weight[:1].clone()
        count = min(_MAX_COPIES, -(-_COLD_BYTES // (weight.numel() * weight.element_size())))
        calls += [(make_linear(action, FullLinear(weight.clone())), row) for _ in range(count)]

    def run() -> None:
        for linear, row in calls:
            linear(row)

    own = device_of(device)
    replay = own.make_capture()(run) if own.has_graphs else run
    times: list[float] = []
    for _ in range(_ROUNDS):
        own.synchronise()
        started = time.perf_counter()
        replay()
        own.synchronise()
        times.append(time.perf_counter() - started)
    return statistics.median(times)
