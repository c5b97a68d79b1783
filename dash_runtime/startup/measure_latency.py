"""Measures a layer's time on this device by action and number of rows: the planner's table.

Interleaves its measurements and takes minima, like `measure.py`. Here several sequences decode together, each over
its own context. Knows the decoder; knows no policies.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import cycle, islice

import torch

from dash_runtime.actions import Action, LatencyTable
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.layers.batch import PassKind
from dash_runtime.layers.compensation import Compensation
from dash_runtime.passes import PassPlan, RowPlan
from dash_runtime.policy.policy import cheapest_kernel
from dash_runtime.startup.measure import SECONDS, different_tokens, filled_caches, least_seconds, rounds_within

_Kind = tuple[int, tuple[Action, ...]]
"""A pass: the place of its number of rows, and their actions in turn."""
_ROWS = (1, 2, 4, 8, 16, 64)
_FEW_ROWS = 16
"""The most rows with a context of their own, whose memory a start has to find; more rows share those. And the rows that
are split into two groups."""
_ROUNDS = 12


@torch.inference_mode()
def measure_latencies(
    decoder: Decoder, compensation: Compensation, rows: tuple[int, ...] = _ROWS, rounds: int = _ROUNDS
) -> LatencyTable:
    """Returns the table for groups of `rows` rows, over contexts of 256 tokens, or as many as the model's holds.

    Args:
        rows: ascending from 1; other sizes are interpolated or extrapolated.
    """
    caches = filled_caches(decoder, min(max(rows), _FEW_ROWS))
    kv_action = cheapest_kernel(decoder.actions)
    batches = [
        decoder.batch(
            PassKind.DECODE,
            list(islice(cycle(caches), count)),
            [1] * count,
            [compensation] * count,
            [kv_action] * count,
        )
        for count in rows
    ]
    for batch in batches:
        batch.is_timed = True
    tokens = [different_tokens(decoder, count) for count in rows]
    places, halves = range(len(rows)), (decoder.highest, min(decoder.actions))
    kinds: list[_Kind] = [(place, (action,)) for place in places for action in decoder.actions]
    split_place = max(place for place in places if rows[place] <= _FEW_ROWS)
    kinds.append((split_place, halves))  # passes with half of the rows in each action
    plans = {kind: _plan(decoder, rows[kind[0]], kind[1]) for kind in kinds}

    def seconds_of_layer(kind: _Kind) -> float:
        arguments = plans[kind], tokens[kind[0]], batches[kind[0]]
        decoder.run_pass(*arguments)  # leaves the caches as decoding does
        record = decoder.run_pass(*arguments).record
        decoder.synchronise()
        times = record.layer_times(0)
        return (times[-1] - times[0]) / 1e9 / decoder.num_layers

    works = {kind: partial(seconds_of_layer, kind) for kind in kinds}
    least = least_seconds(works, rounds_within(SECONDS, rounds))
    table = LatencyTable(
        rows, {action: tuple(least[place, (action,)] for place in places) for action in decoder.actions}
    )
    apart = sum(table.cost(action, rows[split_place] // 2) for action in halves)
    return replace(table, split_seconds=max(0.0, least[kinds[-1]] - apart))


def _plan(decoder: Decoder, num_rows: int, actions: Sequence[Action]) -> PassPlan:
    """Returns the plan of passes whose rows have these actions in all layers, in turn, as rows that were raised to
    them."""
    rows = [RowPlan(dict.fromkeys(range(decoder.num_layers), actions[row % len(actions)])) for row in range(num_rows)]
    heads = [min(decoder.heads)] * num_rows
    return PassPlan(rows[:1] if len(actions) == 1 else rows, heads, attends_rounded=True, wants_logits=False)
