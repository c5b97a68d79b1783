"""The table that judges a policy: its controls, at its own cost."""

from dataclasses import replace
from pathlib import Path

import pytest

from dash_runtime.actions import Action
from dash_runtime.checkpoints import tokenizer_file
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.evaluation.controls import Evaluation, Row, RowKind, with_dominated
from dash_runtime.policy.learned import LearnedPolicy
from dash_runtime.policy.plan_spec import PlanSpec
from dash_runtime.startup.default_text import default_token_sequences
from tests.runtime.support import load_decoder, some_affine, some_costs, some_policy
from tests.tiny_models import NUM_LAYERS

EVALUATION = 0.01
COSTS = replace(some_costs(), evaluation=EVALUATION)
EDGES = dict.fromkeys((0, NUM_LAYERS - 1), Action.FULL)


@pytest.fixture(scope="module")
def decoder(tiny_folder: Path) -> Decoder:
    return load_decoder(tiny_folder)


@pytest.fixture(scope="module")
def sequences(tiny_folder: Path) -> list[list[int]]:
    return default_token_sequences(tokenizer_file(tiny_folder), 3, 24)


def policy_with(decoder: Decoder, actions: tuple[Action, ...]) -> LearnedPolicy:
    spec = PlanSpec(actions, pinned=EDGES, lookahead=1, block_size=2, head=Action.FULL, costs=COSTS)
    return some_policy(spec, decoder.config.hidden_size, (0.5, 0.0, 0.1), compensation=some_affine(decoder))


@pytest.mark.parametrize("actions", [(Action.SKIP, Action.FULL), tuple(Action)])
def test_every_budget_has_the_policy_and_its_controls_at_about_its_cost(
    decoder: Decoder, sequences: list[list[int]], actions: tuple[Action, ...]
) -> None:
    evaluation = Evaluation(decoder, policy_with(decoder, actions), sequences, sequences[:1], 4)
    learned, chosen = evaluation.learned(0.5)
    rows = with_dominated([*evaluation.uniform(), learned, *evaluation.controls(0.5, learned.cost_share, chosen)])
    kinds = [row.kind for row in rows]
    assert kinds.count(RowKind.POLICY) == kinds.count(RowKind.RANDOM) == kinds.count(RowKind.EARLY_EXIT) == 1
    assert kinds.count(RowKind.STATIC) == (1 if len(actions) == len(Action) else 2)
    assert {"fixed-int4", "fixed-int8", "full-depth"} <= {row.name for row in rows if row.kind is RowKind.FIXED}
    for row in rows:
        assert row.tokens == 3 * 20
        if row.kind is RowKind.RANDOM:
            # A network's evaluations are the policy's alone.
            assert row.cost_share == pytest.approx(learned.cost_share - 2 * EVALUATION, abs=0.05)
    best = next(row for row in rows[kinds.index(RowKind.POLICY) :] if row.kind is RowKind.FIXED)
    cheapest = min(row.cost_share for row in rows if row.kind is RowKind.FIXED)
    assert best.cost_share <= max(learned.cost_share, cheapest)


def row_of(kind: RowKind, cost: float, divergence: float) -> Row:
    return Row("r", kind, (), cost, cost, divergence, 1.0, 10)


def test_what_a_fixed_plan_beats_is_dominated() -> None:
    policy, fixed, static, random = RowKind.POLICY, RowKind.FIXED, RowKind.STATIC, RowKind.RANDOM
    rows = [
        row_of(fixed, 0.5, 0.1),
        row_of(policy, 0.5, 0.1),
        row_of(policy, 0.49, 0.2),
        row_of(policy, 0.6, 0.09),
        row_of(random, 0.4, 0.3),
        row_of(policy, 0.45, 0.4),
        row_of(static, 0.5, 0.2),
    ]
    # A random plan beats nobody: only a fixed one does.
    assert [row.dominated for row in with_dominated(rows)] == [False, True, False, False, False, False, True]
