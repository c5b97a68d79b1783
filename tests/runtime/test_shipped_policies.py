"""The policies that come with the package: for the embedded model, small, and each with its card."""

from pathlib import Path

import pytest
import torch

from dash_runtime.actions import Action
from dash_runtime.checkpoints import load_model_config, open_weights
from dash_runtime.commands.evaluate import multiply_adds_share
from dash_runtime.policy.frontier import Frontier
from dash_runtime.policy.learned import LearnedPolicy
from dash_runtime.policy.model_sketch import model_fingerprint
from dash_runtime.policy.policy_file import find_policies, load_policy
from dash_runtime.startup.build import SHIPPED_POLICIES, suited
from tests.runtime.support import CPU

pytestmark = pytest.mark.embedded


@pytest.fixture(scope="module")
def shipped(embedded_folder: Path) -> list[tuple[Path, LearnedPolicy]]:
    config = load_model_config(embedded_folder)
    fingerprint = model_fingerprint(config, open_weights(embedded_folder))
    files = find_policies(SHIPPED_POLICIES, fingerprint)
    return [(file, load_policy(file, config, fingerprint, dtype=torch.bfloat16, device=CPU)) for file in files]


FOUR = (Action.SKIP, Action.INT4, Action.INT8, Action.FULL)


def test_the_default_policy_has_four_actions_and_one_only_skips(shipped: list[tuple[Path, LearnedPolicy]]) -> None:
    near = suited([policy for _, policy in shipped], has_streams=False)
    assert [policy.spec.actions for policy in near] == [FOUR, (Action.SKIP, Action.FULL)]


def test_the_default_on_a_device_with_streams_decides_four_layers_ahead(
    shipped: list[tuple[Path, LearnedPolicy]],
) -> None:
    first, *_ = suited([policy for _, policy in shipped], has_streams=True)
    assert (first.lookahead, first.spec.actions) == (4, FOUR)


def test_each_is_small_is_cheap_to_evaluate_and_has_a_card_with_its_command(
    shipped: list[tuple[Path, LearnedPolicy]], embedded_folder: Path
) -> None:
    config = load_model_config(embedded_folder)
    for file, policy in shipped:
        assert file.stat().st_size < 4_000_000
        assert multiply_adds_share(policy, config) < 0.02
        card = file.with_suffix(".md").read_text("utf-8")
        assert f"--name {policy.name}" in card
        assert f"ecommended budget {policy.recommended_budget(policy.costs):.3f}" in card


def test_a_recommended_budget_is_harmless_on_the_text_of_its_calibration(
    shipped: list[tuple[Path, LearnedPolicy]],
) -> None:
    for _, policy in shipped:
        budgets = policy.budgets(policy.costs)
        assert budgets.divergence(policy.recommended_budget(policy.costs)) <= 0.05


def test_each_has_fixed_plans_and_what_they_beat_is_never_recommended(
    shipped: list[tuple[Path, LearnedPolicy]],
) -> None:
    for _, policy in shipped:
        assert {"fixed-int4", "fixed-int8"} <= {plan.name for plan in policy.plans}
        frontier = Frontier(policy.costs, policy.plans, policy.budgets(policy.costs))
        best = frontier.within(frontier.recommended_budget)
        assert best.divergence <= 0.05
        assert best.plan is not None or not frontier.is_beaten(best.cost, best.divergence)
