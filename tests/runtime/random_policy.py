"""A policy for a tiny model that has learned nothing: it takes every action somewhere, by the state of each token."""

from collections.abc import Sequence
from pathlib import Path

import torch

from dash_runtime.actions import Action
from dash_runtime.checkpoints import load_model_config, open_weights
from dash_runtime.policy.learned import LearnedPolicy
from dash_runtime.policy.model_sketch import model_fingerprint
from dash_runtime.policy.plan_spec import PlanSpec
from dash_runtime.policy.policy import full_edges
from dash_runtime.policy.policy_file import save_policy
from tests.runtime.support import ALL_ACTIONS, load_decoder, some_affine, some_calibration, some_costs, some_network

NAME = "random-network"


def random_policy(
    folder: Path,
    budgets: tuple[float, float] = (0.25, 0.85),
    block_size: int = 2,
    lookahead: int = 1,
    actions: Sequence[Action] = ALL_ACTIONS,
) -> LearnedPolicy:
    """Returns a policy for the model in `folder`."""
    config = load_model_config(folder)
    spec = PlanSpec(
        actions=tuple(actions),
        pinned=dict.fromkeys(range(lookahead), Action.FULL) | full_edges(config.num_layers),
        lookahead=lookahead,
        block_size=block_size,
        head=Action.INT8,
        costs=some_costs(config.num_layers),
    )
    low, high = budgets
    return LearnedPolicy(
        name=NAME,
        network=some_network(spec, config.hidden_size, seed=5).rounded(),  # as one from a file
        spec=spec,
        compensation=some_affine(load_decoder(folder, torch.bfloat16)),
        calibration=some_calibration(spec, (low, 1.0, 0.4), (high, -1.0, 0.1)),
    )


def save_random_policy(path: Path, folder: Path) -> Path:
    """Writes one that decides each layer by itself."""
    fingerprint = model_fingerprint(load_model_config(folder), open_weights(folder))
    save_policy(path, random_policy(folder, block_size=1), fingerprint)
    return path
