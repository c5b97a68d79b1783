"""The table that judges a policy: its controls, at its own cost."""

from pathlib import Path

import pytest
import torch

from dash_runtime.actions import Action
from dash_runtime.checkpoints import tokenizer_file
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.decoder.full_path import full_path
from dash_runtime.evaluation.controls import Evaluation, greedy_skip_order
from dash_runtime.policy.learned import BudgetCalibration, LearnedPolicy
from dash_runtime.policy.plan_spec import PlanSpec
from dash_runtime.rollout.task import Task, path_outcome
from dash_runtime.startup.default_text import default_token_sequences
from dash_runtime.training.actor_critic import ActorCritic
from tests.runtime.support import load_decoder, some_affine, some_costs
from tests.tiny_models import NUM_LAYERS

EDGES = frozenset((0, NUM_LAYERS - 1))


@pytest.fixture(scope="module")
def decoder(tiny_folder: Path) -> Decoder:
    return load_decoder(tiny_folder)


@pytest.fixture(scope="module")
def sequences(tiny_folder: Path) -> list[list[int]]:
    return default_token_sequences(tokenizer_file(tiny_folder), 3, 24)


def policy_with(decoder: Decoder, actions: tuple[Action, ...]) -> LearnedPolicy:
    spec = PlanSpec(actions, pinned=EDGES, lookahead=1, block_size=2, head=Action.FULL, costs=some_costs())
    model = ActorCritic(spec, decoder.config.hidden_size, seed=0)
    with torch.no_grad():
        model.actor.output_weight.copy_(torch.randn_like(model.actor.output_weight))
        model.actor.output_bias.zero_()
    return LearnedPolicy(
        name="mine",
        network=model.network(),
        spec=spec,
        compensation=some_affine(decoder),
        calibration=BudgetCalibration(((0.5, 0.0),), (0.1,), 0.5),
    )


@pytest.mark.parametrize("actions", [(Action.SKIP, Action.FULL), tuple(Action)])
def test_every_budget_has_the_policy_and_its_controls_at_about_its_cost(
    decoder: Decoder, sequences: list[list[int]], actions: tuple[Action, ...]
) -> None:
    evaluation = Evaluation(decoder, policy_with(decoder, actions), sequences, sequences[:1], 4)
    base = "INT4" if Action.INT4 in actions else "FULL"
    learned, chosen = evaluation.learned(0.5)
    rows = [learned, *evaluation.controls(0.5, learned.cost_share, chosen)]
    static = [f"greedy static skips on {base}", f"even static skips on {base}"]
    assert [row.name for row in rows] == ["mine", "random, same rates", *static, "early exit"]
    one_skip = some_costs().layer[Action.FULL]
    for row in rows:
        assert row.tokens == 3 * 20
        assert row.divergence > 0
        if row.name.startswith("random"):
            assert row.cost_share == pytest.approx(rows[0].cost_share, abs=0.05)
        if base == "FULL":
            assert abs(row.cost_share - rows[0].cost_share) < one_skip


def test_the_greedy_search_starts_with_the_layer_that_costs_least_divergence(
    decoder: Decoder, sequences: list[list[int]]
) -> None:
    actions = (Action.SKIP, Action.FULL)
    spec = PlanSpec(actions, pinned=EDGES, lookahead=1, block_size=1, head=Action.FULL, costs=some_costs())
    task = Task(decoder=decoder, spec=spec, compensation=some_affine(decoder), num_prompt_tokens=4)
    (best,) = greedy_skip_order(task, sequences, Action.FULL)(1)
    full = full_path(decoder, sequences)

    def divergence(layer: int) -> float:
        def choose(block: tuple[int, ...], hidden: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
            return torch.full((1, len(hidden)), int(Action.SKIP if block == (layer,) else Action.FULL))

        return path_outcome(task, sequences, choose, full)[0].divergence

    assert divergence(best) == min(divergence(layer) for (layer,) in spec.decision_blocks)
    assert len(greedy_skip_order(task, sequences, Action.FULL)(3)) == 3
