"""A policy for a tiny model that has learned nothing: it takes every action somewhere, by the state of each token."""

from pathlib import Path

import torch

from dash_runtime.actions import Action
from dash_runtime.checkpoints import load_model_config, open_weights
from dash_runtime.policy.learned import LearnedPolicy, PolicyNetwork
from dash_runtime.policy.model_sketch import model_fingerprint
from dash_runtime.policy.plan_spec import PlanSpec
from dash_runtime.policy.policy import full_edges
from dash_runtime.policy.policy_file import save_policy
from tests.runtime.support import ALL_ACTIONS, load_decoder, some_affine, some_calibration, some_costs

NAME = "random-network"


def random_policy(folder: Path, budgets: tuple[float, float] = (0.25, 0.85), block_size: int = 2) -> LearnedPolicy:
    """Returns a policy for the model in `folder`."""
    generator = torch.Generator().manual_seed(5)
    width, embedding_size = 16, 4
    config = load_model_config(folder)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    spec = PlanSpec(
        actions=ALL_ACTIONS,
        pinned=full_edges(config.num_layers),
        lookahead=1,
        block_size=block_size,
        head=Action.INT8,
        costs=some_costs(config.num_layers),
    )
    num_blocks = len(spec.decision_blocks)
    network = PolicyNetwork(
        block_embedding=random(num_blocks, embedding_size),
        action_embedding=random(len(Action), embedding_size),
        input_weight=random(width, config.hidden_size + 2 * embedding_size + 3),
        input_bias=random(width),
        output_weight=random(num_blocks, block_size, len(ALL_ACTIONS), width),
        output_bias=random(num_blocks, block_size, len(ALL_ACTIONS)),
    )
    low, high = budgets
    return LearnedPolicy(
        name=NAME,
        network=network,
        spec=spec,
        compensation=some_affine(load_decoder(folder, torch.bfloat16)),
        calibration=some_calibration(spec, (low, 1.0, 0.4), (high, -1.0, 0.1)),
    )


def save_random_policy(path: Path, folder: Path) -> Path:
    """Writes one that decides each layer by itself."""
    fingerprint = model_fingerprint(load_model_config(folder), open_weights(folder))
    save_policy(path, random_policy(folder, block_size=1), fingerprint)
    return path
