"""Measures a layer's time on this device by action and number of rows: the planner's table.

Interleaves its measurements and takes minima, like `measure.py`. Here several sequences decode together, each over
its own context. Knows the decoder; knows no policies.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from dash_runtime.actions import Action, LatencyTable
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.layers.batch import PassKind
from dash_runtime.layers.compensation import Compensation
from dash_runtime.policy.policy import cheapest_kernel
from dash_runtime.startup.measure import SECONDS, different_tokens, filled_caches, rounds_within, timed

_ROWS = (1, 2, 4, 8, 16)
_ROUNDS = 12
_MAX_LAYERS = 8
"""Layers of a pass, spread over the model: enough that none finds its weights in a near cache, few enough that a start
need not wait for all of them."""


@torch.inference_mode()
def measure_latencies(
    decoder: Decoder, compensation: Compensation, rows: tuple[int, ...] = _ROWS, rounds: int = _ROUNDS
) -> LatencyTable:
    """Returns the table for groups of `rows` rows, over contexts of 256 tokens, or as many as the model's holds.

    Args:
        rows: ascending from 1; other sizes are interpolated or extrapolated.
    """
    layers = _spread(decoder.num_layers)
    caches = filled_caches(decoder, max(rows))
    kv_action = cheapest_kernel(decoder.actions)
    batches = [
        decoder.batch(PassKind.DECODE, caches[:count], [1] * count, [compensation] * count, [kv_action] * count)
        for count in rows
    ]
    embedded = [decoder.embed(different_tokens(decoder, count)) for count in rows]
    inputs = [[hidden.to(device) for device in decoder.devices] for hidden in embedded]

    def run_layers(place: int, *actions: Action) -> None:
        taken = [actions[row % len(actions)] for row in range(rows[place])]
        for layer in layers:
            decoder.run_layer(layer, taken, inputs[place][layer], batches[place])

    split: list[float] = []  # passes over the most rows, half of them in FULL and half in the cheapest action
    seconds: dict[Action, list[list[float]]] = {action: [[] for _ in rows] for action in decoder.actions}
    for round_number in rounds_within(SECONDS, rounds):
        for place in range(len(rows)):
            for action, own in seconds.items():
                elapsed = timed(decoder, partial(run_layers, place, action))
                if round_number > 0:  # the first round warms up
                    own[place].append(elapsed / len(layers))
        elapsed = timed(decoder, partial(run_layers, -1, Action.FULL, min(decoder.actions)))
        if round_number > 0:
            split.append(elapsed / len(layers))
    table = LatencyTable(rows, {action: tuple(map(min, by_rows)) for action, by_rows in seconds.items()})
    halves = [table.cost(action, rows[-1] // 2) for action in (Action.FULL, min(decoder.actions))]
    return replace(table, split_seconds=max(0.0, min(split) - sum(halves)))


def _spread(num_layers: int) -> Sequence[int]:
    """Returns at most `_MAX_LAYERS` layers, the first and the last among them."""
    if num_layers <= _MAX_LAYERS:
        return range(num_layers)
    return [place * (num_layers - 1) // (_MAX_LAYERS - 1) for place in range(_MAX_LAYERS)]
