"""The policy of the adaptive figures: the one that ships for the model, at an engine's costs. Measures nothing."""

from pathlib import Path

import torch

from dash_runtime.actions import CostTable
from dash_runtime.checkpoints import load_model_config, open_weights
from dash_runtime.engine.engine import Engine
from dash_runtime.policy.learned import LearnedPolicy
from dash_runtime.policy.model_sketch import model_fingerprint
from dash_runtime.policy.policy_file import find_policies, load_policy
from dash_runtime.startup.build import SHIPPED_POLICIES
from dash_runtime.startup.cost_keeper import CostKeeper


def costs_of(engine: Engine) -> CostTable:
    """Returns the cost table by which an engine counts budgets."""
    assert isinstance(engine.cost_watch, CostKeeper)
    return engine.cost_watch.costs.table


def shipped_policy(folder: Path) -> LearnedPolicy | None:
    """Returns the policy that serves the checkpoint in `folder` by default, or None if none is shipped for it."""
    model, weights = load_model_config(folder), open_weights(folder)
    fingerprint = model_fingerprint(model, weights)
    files = find_policies(SHIPPED_POLICIES, fingerprint)
    if not files:
        return None
    return load_policy(files[0], model, fingerprint, dtype=torch.bfloat16, device=torch.device("cpu"))
