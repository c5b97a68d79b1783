"""The facts about an answer besides its text, as plain values that JSON can hold. Knows no framework."""

from typing import Any

from dash_client.types import Generation


def answer_facts(generation: Generation) -> dict[str, Any]:
    """Returns the finish reason, mode, policy, cost and other facts; leaves out those that are None."""
    started, depth = generation.started, generation.depth
    facts: dict[str, Any] = {
        "model_name": started.model,
        "finish_reason": generation.finish_reason.value,
        "stop_string": generation.stop_string,
        "mode": started.mode.value,
        "policy": started.policy or None,
        "policy_note": started.policy_note or None,
        "compute_budget": started.compute_budget,
        "mean_cost": depth.mean_cost,
        "mean_layers": {action.name.lower(): mean for action, mean in depth.mean_layers.items()} or None,
        "seed": started.seed,
        "request_id": started.request_id,
    }
    if generation.decisions is not None:
        facts["decisions"] = [[action.name.lower() for action in row] for row in generation.decisions]
    if generation.logprobs is not None:
        facts["logprobs"] = [
            {"token_id": token_id, "chosen": token.chosen, "top": [list(pair) for pair in token.top]}
            for token_id, token in zip(generation.token_ids, generation.logprobs, strict=True)
        ]
    return {name: value for name, value in facts.items() if value is not None}
