"""Measures what each action costs on this device: the cost table.

Interleaves the actions and walks through all layers, so that caches and a drifting clock treat them alike. Takes
minima, since other work on the machine only adds time, and the table is kept. A skip projects its keys and values with
the cheapest kernel. Knows the decoder; knows no policies.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from dash_runtime.actions import Action, CostTable
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.devices import device_of
from dash_runtime.layers.batch import PassKind
from dash_runtime.layers.compensation import Compensation, Identity
from dash_runtime.layers.kv_cache import SequenceCache
from dash_runtime.policy.policy import cheapest_kernel

_CONTEXT_TOKENS = 256
_ROUNDS = 12


@torch.inference_mode()
def measure_costs(decoder: Decoder, compensation: Compensation, rounds: int = _ROUNDS) -> CostTable:
    """Returns the cost table for one row over a context of 256 tokens, or as many as the model's context holds."""
    batch = decoder.batch(
        PassKind.DECODE, filled_caches(decoder), [1], [compensation], [cheapest_kernel(decoder.actions)]
    )
    hidden = decoder.embed([0])
    layer_seconds: dict[Action, list[float]] = {action: [] for action in decoder.actions}
    head_seconds: dict[Action, list[float]] = {precision: [] for precision in decoder.heads}
    fixed_seconds: list[float] = []

    def run_layers(action: Action) -> None:
        for layer in range(decoder.num_layers):
            decoder.run_layer(layer, (action,), hidden, batch)

    logits = torch.zeros(1, decoder.config.vocab_size, device=decoder.device)
    for round_number in range(rounds + 1):
        measured: list[tuple[list[float], Callable[[], object]]] = [
            *((seconds, partial(run_layers, action)) for action, seconds in layer_seconds.items()),
            *((head_seconds[head], partial(decoder.logits, hidden, (head,))) for head in decoder.heads),
            (fixed_seconds, lambda: (decoder.embed([0]), logits.argmax(-1).tolist())),
        ]
        for seconds, work in measured:
            elapsed = timed(decoder.device, work)
            if round_number > 0:  # the first round warms up
                seconds.append(elapsed)
    shortest = {action: min(seconds) for action, seconds in layer_seconds.items()}
    return CostTable.from_seconds(
        decoder.num_layers,
        {action: seconds / decoder.num_layers for action, seconds in shortest.items()},
        {precision: min(seconds) for precision, seconds in head_seconds.items()},
        min(fixed_seconds),
    )


@torch.inference_mode()
def measure_verification(decoder: Decoder, lengths: Sequence[int], rounds: int = _ROUNDS) -> dict[int, float]:
    """Measures the time to verify a draft, by its length, as a multiple of the time for one token.

    A verification is a full-depth pass over the draft's tokens and the one before, head included. Lengths that the
    model's context cannot hold are left out.
    """
    fitting = [length for length in lengths if length + 1 < decoder.context_length]
    (cache,) = filled_caches(decoder, num_more=1 + max(fitting, default=0))
    seconds: dict[int, list[float]] = {length: [] for length in (0, *fitting)}

    def run_pass(length: int) -> None:
        count = length + 1
        batch = decoder.batch(PassKind.VERIFY, [cache], [count], [Identity()])
        hidden = decoder.embed([0] * count)
        for layer in range(decoder.num_layers):
            hidden = decoder.run_layer(layer, (Action.FULL,) * count, hidden, batch)
        decoder.logits(hidden, (Action.FULL,) * count).argmax(-1).tolist()

    for round_number in range(rounds + 1):
        for length, own in seconds.items():
            elapsed = timed(decoder.device, partial(run_pass, length))
            if round_number > 0:  # the first round warms up
                own.append(elapsed)
    return {length: min(seconds[length]) / min(seconds[0]) for length in fitting}


def filled_caches(
    decoder: Decoder, count: int = 1, num_more: int = 1, num_tokens: int = _CONTEXT_TOKENS
) -> list[SequenceCache]:
    """Returns contexts of `num_tokens` each, or as many as the model's context holds, with room for `num_more`."""
    context = min(num_tokens, decoder.context_length - num_more)
    caches = decoder.caches([context + num_more] * count)
    for cache in caches:
        cache.append(torch.zeros_like(cache.pool.memory[:, :, :context]))  # written, so that it is in memory
    return caches


def timed(device: torch.device, work: Callable[[], object]) -> float:
    """Returns the seconds until the device has done the work."""
    started = time.perf_counter()
    work()
    device_of(device).synchronise()
    return time.perf_counter() - started
