"""Policies that ignore the state, the budgets they keep, and the catalog that hands them out."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from dash_runtime.actions import Action, CostTable
from dash_runtime.config import Mode, SkipOptions
from dash_runtime.errors import ConfigError
from dash_runtime.layers.compensation import Identity
from dash_runtime.policy.budget import BUDGET_MARGIN, lowest_random_budget, random_plan_for_budget
from dash_runtime.policy.catalog import PolicyCatalog
from dash_runtime.policy.learned import BudgetCalibration, LearnedPolicy
from dash_runtime.policy.plan_spec import PlanSpec
from dash_runtime.policy.policy import RandomPlan, State, Token, fixed_action_plan
from dash_runtime.training.actor_critic import ActorCritic
from tests.runtime.support import ALL_ACTIONS, some_costs

COSTS = some_costs(30)
HIDDEN = torch.zeros(1, 4)


def state_of(*tokens: Token) -> State:
    return State(tokens, HIDDEN.expand(len(tokens), -1), 0, (Action.FULL,) * len(tokens), [0.0] * len(tokens))


def token_plan(plan: RandomPlan, token: Token) -> list[Action]:
    return [
        Action.FULL if layer in plan.pinned else plan.start(layer, state_of(token))().plan[0][0] for layer in range(30)
    ]


def catalog(default_compute_budget: float | None = None) -> PolicyCatalog:
    return PolicyCatalog(COSTS, ALL_ACTIONS, Identity(), (), default_compute_budget)


def test_a_random_plan_draws_at_its_rates() -> None:
    rates = {Action.SKIP: 0.1, Action.INT4: 0.2, Action.INT8: 0.3, Action.FULL: 0.4}
    plan = RandomPlan([rates] * 30, "random", Action.FULL, Identity(), frozenset())
    drawn = Counter(action for position in range(400) for action in token_plan(plan, Token(7, position, 1.0)))
    for action, rate in rates.items():
        assert drawn[action] / drawn.total() == pytest.approx(rate, abs=0.02)


def test_a_random_draw_depends_on_seed_position_and_layer_and_on_nothing_else() -> None:
    plan = random_plan_for_budget(0.5, COSTS, ALL_ACTIONS, Action.FULL, Identity())
    token, other = Token(1, 9, 1.0), Token(2, 9, 1.0)
    assert token_plan(plan, token) == token_plan(plan, token)
    assert token_plan(plan, token) != token_plan(plan, other)
    assert token_plan(plan, token) != token_plan(plan, Token(1, 10, 1.0))
    together = plan.start(4, state_of(other, token, other))().plan[0]
    assert together[1] == plan.start(4, state_of(token))().plan[0][0]


@pytest.mark.parametrize("budget", [0.35, 0.5, 0.7, 0.8, 0.95])
def test_the_mean_cost_of_a_random_plan_stays_within_its_budget_and_near_it(budget: float) -> None:
    plan = random_plan_for_budget(budget, COSTS, ALL_ACTIONS, Action.INT8, Identity())
    for seed in range(5):
        tokens = [token_plan(plan, Token(seed, position, 1.0)) for position in range(100)]
        mean = sum(COSTS.token_cost(actions, plan.head) for actions in tokens) / len(tokens)
        assert budget - 3 * BUDGET_MARGIN < mean <= budget


def test_a_budget_of_one_runs_every_layer_in_full() -> None:
    plan = random_plan_for_budget(1.0, COSTS, ALL_ACTIONS, Action.FULL, Identity())
    assert set(token_plan(plan, Token(0, 0, 1.0))) == {Action.FULL}


def test_the_lowest_budget_takes_the_cheapest_action_everywhere_but_at_the_edges() -> None:
    lowest = lowest_random_budget(COSTS, ALL_ACTIONS, Action.INT8)
    plan = random_plan_for_budget(lowest, COSTS, ALL_ACTIONS, Action.INT8, Identity())
    actions = token_plan(plan, Token(0, 0, 1.0))
    assert actions == [Action.FULL, *[Action.SKIP] * 28, Action.FULL]
    assert COSTS.token_cost(actions, Action.INT8) <= lowest


def test_the_edges_are_never_decided() -> None:
    for plan in (
        fixed_action_plan(Action.SKIP, COSTS, Identity(), ()),
        random_plan_for_budget(0.5, COSTS, ALL_ACTIONS, Action.FULL, Identity()),
    ):
        assert plan.pinned == {0, 29}


@pytest.mark.parametrize(
    ("action", "heads", "head"),
    [
        (Action.INT4, (Action.INT8, Action.FULL), Action.INT8),
        (Action.INT4, (Action.FULL,), Action.FULL),
        (Action.FULL, (Action.INT8, Action.FULL), Action.FULL),
        (Action.SKIP, (Action.INT8, Action.FULL), Action.FULL),
    ],
)
def test_quantised_plans_take_the_int8_head_where_there_is_one(
    action: Action, heads: tuple[Action, ...], head: Action
) -> None:
    assert fixed_action_plan(action, COSTS, Identity(), heads).head is head


def test_adaptive_requests_share_a_policy_only_at_the_same_budget() -> None:
    policies = catalog()
    first, same, other = (policies.assign(SkipOptions(Mode.ADAPTIVE, budget)) for budget in (0.7, 0.7, 0.6))
    assert first.policy is same.policy
    assert first.policy is not other.policy
    assert first.compute_budget == 0.7


def test_without_a_learned_policy_adaptive_says_that_it_draws_at_random() -> None:
    facts = catalog().facts()
    assert [policy.name for policy in facts] == ["random", "static-int4"]
    assert not facts[0].learned
    assert "not a learned policy" in facts[0].note


def test_a_default_budget_below_what_can_be_kept_is_raised_to_it() -> None:
    assignment = catalog(default_compute_budget=0.01).assign(SkipOptions(Mode.ADAPTIVE))
    assert assignment.compute_budget == catalog().facts()[0].lowest_budget


def trained(name: str, lowest_budget: float) -> LearnedPolicy:
    pinned = frozenset((0, 29))
    spec = PlanSpec(ALL_ACTIONS, pinned=pinned, lookahead=1, block_size=4, head=Action.FULL, costs=COSTS)
    return LearnedPolicy(
        name=name,
        network=ActorCritic(spec, hidden_size=4, seed=0).network(),
        spec=spec,
        compensation=Identity(),
        calibration=BudgetCalibration(((lowest_budget, 1.0), (0.9, -1.0)), (0.2, 0.01), 0.9),
    )


def test_the_first_learned_policy_is_the_default_and_each_is_had_by_name_at_the_price_of_its_budget() -> None:
    policies = PolicyCatalog(COSTS, ALL_ACTIONS, Identity(), (trained("a", 0.5), trained("b", 0.4)), 0.8)
    assert [facts.name for facts in policies.facts()] == ["a", "b", "random", "static-int4"]
    assert [facts.learned for facts in policies.facts()] == [True, True, False, False]
    default = policies.assign(SkipOptions(Mode.ADAPTIVE))
    assert default.policy.name == "a"
    assert default.price == pytest.approx(0.6065, abs=1e-3)
    assert policies.assign(SkipOptions(Mode.ADAPTIVE, 0.95)).price == pytest.approx(0.368, abs=1e-3)
    assert policies.assign(SkipOptions(Mode.ADAPTIVE, policy_name="b")).policy.name == "b"
    assert policies.assign(SkipOptions(Mode.ADAPTIVE, policy_name="random")).policy.name == "random"


def test_in_exact_the_cheapest_kernel_drafts_unless_a_policy_was_made_to_or_is_named() -> None:
    policies = [trained("a", 0.5), replace(trained("b", 0.4), is_drafter=True)]
    without, with_drafter = (
        PolicyCatalog(COSTS, ALL_ACTIONS, Identity(), own, 0.8) for own in (policies[:1], policies)
    )
    static = without.assign(SkipOptions(Mode.EXACT))
    assert static.policy.name == "static-int4"
    assert static.policy.pinned_action is Action.INT4
    assert static.drafting is not None
    assert with_drafter.assign(SkipOptions(Mode.EXACT)).policy.name == "b"
    assert with_drafter.assign(SkipOptions(Mode.ADAPTIVE)).policy.name == "a"
    named = without.assign(SkipOptions(Mode.EXACT, 0.6, "a", draft_length=3))
    assert named.policy.name == "a"
    assert named.policy.head is Action.INT8  # the cheapest, whatever the policy's own is
    assert named.drafting is not None
    assert set(named.drafting.verification_costs) == {1, 3}


def test_full_depth_and_fixed_modes_get_their_own_policies() -> None:
    policies = catalog()
    assert policies.assign(SkipOptions(Mode.FULL_DEPTH)).policy.name == "full-depth"
    fixed = policies.assign(SkipOptions(Mode.FIXED, fixed_action=Action.INT4)).policy
    assert fixed.name == "fixed-int4"
    assert fixed.head is Action.INT8


def test_a_cost_table_is_a_share_of_the_full_depth_token() -> None:
    assert COSTS.token_cost([Action.FULL] * 30, Action.FULL) == pytest.approx(1)
    with pytest.raises(ConfigError, match="adds up"):
        CostTable(30, {Action.FULL: 0.5}, {Action.FULL: 0.1})
    with pytest.raises(ConfigError, match="FULL"):
        CostTable(30, {Action.SKIP: 0.5}, {Action.FULL: 0.1})
