"""Measures what a prompt takes in each precision that it may have. Knows the decoder; knows no requests."""

import time
from collections.abc import Callable, Mapping
from functools import partial

import torch

from dash_runtime.actions import Action
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.layers.batch import PassKind
from dash_runtime.layers.compensation import Identity
from dash_runtime.passes import PassPlan
from dash_runtime.startup.measure import SECONDS, different_tokens, least_seconds, rounds_within, timed

_TOKENS = 128
_ROUNDS = 4
_LEAST_GAIN = 1.1
"""A smaller gain is worth no loss."""


def prefill_actions(decoder: Decoder) -> tuple[Action, ...]:
    """Returns the actions that prompts may run in: the highest, and INT8."""
    return tuple(action for action in (decoder.highest, Action.INT8) if action in decoder.actions)


@torch.inference_mode()
def measure_prompts(
    decoder: Decoder, rounds: int = _ROUNDS, now: Callable[[], float] = time.monotonic
) -> dict[Action, float]:
    """Measures the seconds of a pass over a prompt's first tokens in each action that prompts may run in."""
    count = min(_TOKENS, decoder.context_length - 1, decoder.max_prompt_rows)
    (cache,) = decoder.caches([count])
    batch = decoder.batch(PassKind.PREFILL, [cache], [count], [Identity()])
    token_ids = different_tokens(decoder, count)

    def run(action: Action) -> None:
        decoder.run_pass(PassPlan.of((action,) * decoder.num_layers), token_ids, batch)

    works = {action: partial(timed, decoder, partial(run, action)) for action in prefill_actions(decoder)}
    return dict(least_seconds(works, rounds_within(SECONDS, rounds, now)))


def fastest_prefill(seconds: Mapping[Action, float]) -> Action:
    """Returns the action for prompts of those who are not at full depth."""
    highest, fastest = max(seconds), min(seconds, key=lambda action: seconds[action])
    return fastest if seconds[highest] >= _LEAST_GAIN * seconds[fastest] else highest
