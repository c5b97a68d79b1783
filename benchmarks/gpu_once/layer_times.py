"""The time of a layer by action, rows and context, beside the time that its bytes take at the measured bandwidth."""

import time
from collections.abc import Sequence

import torch

from benchmarks.gpu_once.decoding import contexts
from benchmarks.gpu_once.live_report import LiveReport
from benchmarks.gpu_once.model import Model
from benchmarks.gpu_once.random_models import cached_bytes
from benchmarks.memory import key_value_bytes, layer_bytes
from dash_runtime.actions import Action
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.devices import device_of
from dash_runtime.layers.batch import Batch, PassKind
from dash_runtime.passes import PassPlan
from dash_runtime.policy.policy import cheapest_kernel

_COPIED_BYTES = {"cuda": 1 << 30}
_COPIED_ELSEWHERE = 1 << 26
_ROUNDS = 5


def copy_bandwidth(device: torch.device) -> list[float]:
    """Returns bytes per second of copying a tensor larger than any cache, read and written; one number per round."""
    source = torch.ones(_COPIED_BYTES.get(device.type, _COPIED_ELSEWHERE), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    rates = []
    for _ in range(_ROUNDS + 1):
        device_of(device).synchronise()
        started = time.perf_counter()
        target.copy_(source)
        device_of(device).synchronise()
        rates.append(2 * source.nbytes / (time.perf_counter() - started))
    return rates[1:]


@torch.inference_mode()
def measure_layers(
    report: LiveReport, model: Model, rows: Sequence[int], num_context: Sequence[int], bandwidth: float
) -> None:
    """Adds µs per layer, the host's µs to queue one, and the µs of its bytes. All layers run, so none is in a cache."""
    report.note(
        "layer_us: from the first layer's call to the end of the device's work, over the layers; host_us: until the "
        "calls are back; by its bytes: matrices, keys, values and compensation at the measured bandwidth"
    )
    medians: dict[Action, float] = {}
    kernel = cheapest_kernel(model.decoder.actions)
    for length in num_context:
        for num_rows in rows:
            with contexts(model.pool, [length] * num_rows, 1) as caches:
                for action in model.decoder.actions:
                    report.check_time()
                    kinds = {"layer": model.decoder} | ({"eager_layer": model.eager} if action is Action.FULL else {})
                    for kind, decoder in kinds.items():
                        batch = decoder.batch(
                            PassKind.DECODE, caches, [1] * num_rows, [model.compensation] * num_rows,
                            [kernel] * num_rows,
                        )  # fmt: skip
                        host, whole = _times(decoder, action, batch)
                        name = f"{model.name}_{{}}_us_{action.name.lower()}_rows{num_rows}_context{length}"
                        seconds = _bytes_read(model, action, kernel, num_rows * length) / bandwidth
                        words = f"{seconds * 1e6:.3g} by its bytes"
                        report.add(name.format(kind), [own * 1e6 for own in whole], words)
                        report.add(name.format(f"{kind}_host"), [own * 1e6 for own in host])
                        if kind == "layer" and (num_rows, length) == (rows[0], num_context[0]):
                            medians[action] = sorted(whole)[len(whole) // 2]
    for action in model.decoder.actions[:-1]:
        ratio = medians[action] / medians[Action.FULL]
        report.add(f"{model.name}_layer_{action.name.lower()}_vs_full", [ratio], "≤ 1")


def _bytes_read(model: Model, action: Action, kernel: Action, num_cached: int) -> float:
    """Returns the bytes that a layer reads: its matrices, and the `num_cached` keys and values that rows attend to.

    A skipped layer reads the matrix of keys and values, which `kernel` runs, and the compensation.
    """
    if action is not Action.SKIP:
        return layer_bytes(model.config, 0, action, is_native=False) + num_cached * cached_bytes(model.config)
    stored = sum(own.nbytes for own in model.compensation.tensors().values()) / model.config.num_layers
    return key_value_bytes(model.config, kernel, is_native=False) + stored


def _times(decoder: Decoder, action: Action, batch: Batch) -> tuple[list[float], list[float]]:
    """Returns seconds per layer by round: until the host has queued it, and until the device has run it."""
    plan, token_ids = PassPlan.of((action,) * decoder.num_layers), [row + 1 for row in range(batch.num_rows)]
    host, whole = [], []
    for _ in range(_ROUNDS + 1):
        decoder.synchronise()
        started = time.perf_counter()
        decoder.run_pass(plan, token_ids, batch)
        queued = time.perf_counter()
        decoder.synchronise()
        host.append((queued - started) / decoder.num_layers)
        whole.append((time.perf_counter() - started) / decoder.num_layers)
    return host[1:], whole[1:]
