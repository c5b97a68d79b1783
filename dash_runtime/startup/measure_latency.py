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
from dash_runtime.startup.measure import SECONDS, different_tokens, filled_caches, least_seconds, rounds_within

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

    places, halves = range(len(rows)), (Action.FULL, min(decoder.actions))
    works = {(place, action): partial(run_layers, place, action) for place in places for action in decoder.actions}
    split = (-1, *halves)  # passes over the most rows, half of them in each action
    seconds = least_seconds(decoder, works | {split: partial(run_layers, *split)}, rounds_within(SECONDS, rounds))
    by_layer = {work: own / len(layers) for work, own in seconds.items()}
    table = LatencyTable(
        rows, {action: tuple(by_layer[place, action] for place in places) for action in decoder.actions}
    )
    apart = sum(table.cost(action, rows[-1] // 2) for action in halves)
    return replace(table, split_seconds=max(0.0, by_layer[split] - apart))


def _spread(num_layers: int) -> Sequence[int]:
    """Returns at most `_MAX_LAYERS` layers, the first and the last among them."""
    if num_layers <= _MAX_LAYERS:
        return range(num_layers)
    return [place * (num_layers - 1) // (_MAX_LAYERS - 1) for place in range(_MAX_LAYERS)]
