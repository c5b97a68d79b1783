"""Serves with a policy as the server does, greedily: generates its own text, and measures its speed.

Knows an engine's modes and clocks; knows no divergence.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from dash_runtime.engine.engine import Engine
from dash_runtime.evaluation.open_answers import Generated, generate, skip_options

_ROUNDS = 5


@dataclass(frozen=True, slots=True)
class Served:
    """Medians over some rounds: `speedup` in tokens per second over full depth's, `policy_share` of the decode time."""

    speedup: float
    policy_share: float


def own_text(
    engine: Engine, prompts: Sequence[Sequence[int]], budget: float, policy_name: str, num_tokens: int
) -> list[list[int]]:
    """Returns each prompt with the policy's `num_tokens` tokens after it. Shorter continuations are left out."""
    outputs = _generate(engine, prompts, budget, policy_name, num_tokens)
    each = ((prompt, output.token_ids) for prompt, output in zip(prompts, outputs, strict=True))
    return [[*prompt, *own] for prompt, own in each if len(own) == num_tokens]


def measure_serving(engine: Engine, prompt: Sequence[int], budget: float, policy_name: str, num_tokens: int) -> Served:
    """Decodes a sequence at full depth and within the budget by turns, so that a drifting clock affects both alike."""
    speedups, shares = [], []
    for round_number in range(_ROUNDS + 1):
        (full,) = _generate(engine, [prompt], None, None, num_tokens)
        (ours,) = _generate(engine, [prompt], budget, policy_name, num_tokens)
        if round_number > 0:  # the first round warms up
            speedups.append(_seconds_per_token(full) / _seconds_per_token(ours))
            shares.append(ours.exposed_seconds / ours.decode_seconds)
    return Served(statistics.median(speedups), statistics.median(shares))


def _generate(
    engine: Engine, prompts: Sequence[Sequence[int]], budget: float | None, policy_name: str | None, num_tokens: int
) -> list[Generated]:
    skip = skip_options(budget, policy_name)
    return generate(engine, lambda token_ids: "", prompts, skip, num_tokens, ignores_end_of_sequence=True)


def _seconds_per_token(output: Generated) -> float:
    return output.decode_seconds / max(1, output.num_decode_tokens)
