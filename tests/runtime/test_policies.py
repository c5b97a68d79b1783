"""Policies that ignore the state, the frontier of budgets, and the catalog that hands them out."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from dash_runtime.actions import Action, CostTable
from dash_runtime.config import Mode, SkipOptions
from dash_runtime.errors import ConfigError
from dash_runtime.layers.compensation import Identity
from dash_runtime.policy.budgets import HARMLESS, BudgetPoint, Budgets
from dash_runtime.policy.catalog import Assignment, PolicyCatalog
from dash_runtime.policy.frontier import Frontier
from dash_runtime.policy.learned import LearnedPolicy
from dash_runtime.policy.plan_spec import PlanSpec
from dash_runtime.policy.policy import RandomPlan, State, Token, fixed_action_plan, full_edges
from tests.runtime.support import ALL_ACTIONS, some_costs, some_plans, some_policy

COSTS = some_costs(30)
PLANS = some_plans(30)
HIDDEN = torch.zeros(1, 4)


def state_of(*tokens: Token) -> State:
    return State(tokens, HIDDEN.expand(len(tokens), -1), 0, (Action.FULL,) * len(tokens), [0.0] * len(tokens))


def token_plan(plan: RandomPlan, token: Token) -> list[Action]:
    return [
        Action.FULL if layer in plan.pinned else plan.start(layer, state_of(token))().plan[0][0] for layer in range(30)
    ]


def catalog(default_compute_budget: float | None = None) -> PolicyCatalog:
    return PolicyCatalog(COSTS, ALL_ACTIONS, Identity(), (), default_compute_budget, plans=PLANS)


def adaptive(policies: PolicyCatalog, budget: float | None = None, name: str | None = None) -> Assignment:
    return policies.assign(SkipOptions(Mode.ADAPTIVE, budget, name))


def test_a_random_plan_draws_at_its_rates() -> None:
    rates = {Action.SKIP: 0.1, Action.INT4: 0.2, Action.INT8: 0.3, Action.FULL: 0.4}
    plan = RandomPlan([rates] * 30, "random", Action.FULL, Identity(), {})
    drawn = Counter(action for position in range(400) for action in token_plan(plan, Token(7, position, 1.0)))
    for action, rate in rates.items():
        assert drawn[action] / drawn.total() == pytest.approx(rate, abs=0.02)


def test_a_random_draw_depends_on_seed_position_and_layer_and_on_nothing_else() -> None:
    rates = dict.fromkeys(Action, 0.25)
    plan = RandomPlan([rates] * 30, "random", Action.FULL, Identity(), full_edges(30))
    token, other = Token(1, 9, 1.0), Token(2, 9, 1.0)
    assert token_plan(plan, token) == token_plan(plan, token)
    assert token_plan(plan, token) != token_plan(plan, other)
    assert token_plan(plan, token) != token_plan(plan, Token(1, 10, 1.0))
    together = plan.start(4, state_of(other, token, other))().plan[0]
    assert together[1] == plan.start(4, state_of(token))().plan[0][0]


def test_one_action_everywhere_runs_in_the_edges_too_unless_it_is_skip() -> None:
    int4, skip = (fixed_action_plan(action, 30, Identity(), ()) for action in (Action.INT4, Action.SKIP))
    assert set(int4.plan) == {Action.INT4}
    assert skip.plan == (Action.FULL, *[Action.SKIP] * 28, Action.FULL)


@pytest.mark.parametrize(
    ("action", "heads", "head"),
    [
        (Action.INT4, (Action.INT4, Action.INT8, Action.FULL), Action.INT4),
        (Action.INT8, (Action.INT4, Action.INT8, Action.FULL), Action.INT8),
        (Action.INT4, (Action.INT8, Action.FULL), Action.INT8),
        (Action.INT4, (Action.FULL,), Action.FULL),
        (Action.FULL, (Action.INT8, Action.FULL), Action.FULL),
        (Action.SKIP, (Action.INT8, Action.FULL), Action.FULL),
    ],
)
def test_quantised_plans_take_the_head_of_their_own_precision_or_the_next_finer_one(
    action: Action, heads: tuple[Action, ...], head: Action
) -> None:
    assert fixed_action_plan(action, 30, Identity(), heads).head is head


def test_adaptive_requests_share_a_plan_within_whose_cost_their_budgets_are() -> None:
    policies = catalog()
    first, same, other = (adaptive(policies, budget) for budget in (0.7, 0.65, 0.5))
    assert first.policy is same.policy
    assert first.policy is not other.policy
    assert (first.compute_budget, same.compute_budget) == (0.7, 0.65)


def test_without_a_learned_policy_adaptive_runs_the_best_fixed_plan_within_the_budget_and_says_so() -> None:
    policies = catalog()
    assert [policy.name for policy in policies.facts()] == ["frontier", "static-int3"]
    assert not policies.facts()[0].learned
    for budget, name in ((1.0, "full-depth"), (0.99, "fixed-int8"), (0.5, "fixed-int4"), (0.4, "plan-0.27")):
        assignment = adaptive(policies, budget)
        assert assignment.policy.name == name
        assert COSTS.token_cost(assignment.policy.pinned.values(), assignment.policy.head) <= budget + 1e-9
        assert "not a learned policy" in assignment.note
    assert adaptive(policies).policy.name == "full-depth"  # the others lose more than 0.01 nats


def test_a_default_budget_below_what_can_be_kept_is_raised_to_it() -> None:
    assignment = adaptive(catalog(default_compute_budget=0.01))
    assert assignment.compute_budget == catalog().facts()[0].lowest_budget


def test_a_plan_that_names_what_this_device_lacks_is_left_out() -> None:
    costs = CostTable.from_seconds(30, {Action.FULL: 1.0, Action.SKIP: 0.1}, {Action.FULL: 2.0}, 0.2)
    policies = PolicyCatalog(costs, (Action.SKIP, Action.FULL), Identity(), (), plans=PLANS)
    assert adaptive(policies, 1.0).policy.name == "full-depth"
    assert policies.facts()[0].lowest_budget == pytest.approx(1)


def trained(name: str, lowest_budget: float, divergence: float = 0.2) -> LearnedPolicy:
    spec = PlanSpec(ALL_ACTIONS, pinned=full_edges(30), lookahead=1, block_size=4, head=Action.FULL, costs=COSTS)
    return some_policy(spec, 4, (lowest_budget, 1.0, divergence), (0.9, -1.0, 0.001), name=name)


@pytest.mark.parametrize(
    ("heads", "head"), [("INT4 INT8 FULL SKIP", "INT4"), ("INT8 FULL SKIP", "INT8"), ("FULL", "FULL")]
)
def test_a_learned_policy_runs_with_its_own_head_or_the_next_finer_one(heads: str, head: str) -> None:
    policy = trained("own", 0.5)
    policy = replace(policy, spec=replace(policy.spec, head=Action.INT4))
    assert policy.for_heads([Action[own] for own in heads.split()]).head is Action[head]


def test_a_learned_policy_runs_by_name_at_the_price_of_its_budget() -> None:
    policies = PolicyCatalog(COSTS, ALL_ACTIONS, Identity(), (trained("a", 0.5), trained("b", 0.4)), 0.8)
    assert [facts.name for facts in policies.facts()] == ["frontier", "a", "b", "static-int3"]
    assert [facts.learned for facts in policies.facts()] == [True, True, True, False]
    default = adaptive(policies)
    assert default.policy.name == "a"
    assert default.price == pytest.approx(0.6065, abs=1e-3)
    assert adaptive(policies, 0.95, "a").price == pytest.approx(0.368, abs=1e-3)
    assert adaptive(policies, name="b").policy.name == "b"


def test_adaptive_runs_the_learned_policy_only_where_no_fixed_plan_is_better() -> None:
    own = (replace(trained("a", 0.3, divergence=0.1), plans=PLANS),)
    policies = PolicyCatalog(COSTS, ALL_ACTIONS, Identity(), own)
    assert adaptive(policies, 0.31).policy.name == "a"
    assert adaptive(policies, 0.42).policy.name == "fixed-int4"
    assert adaptive(policies, 0.42, "a").policy.name == "a"  # who names it gets it
    assert adaptive(policies, 0.85).policy.name == "a"
    facts = {facts.name: facts for facts in policies.facts()}
    recommended = facts["frontier"].recommended_budget
    assert adaptive(policies).policy.name == "fixed-int4"
    assert COSTS.token_cost([Action.INT4] * 30, Action.INT8) == pytest.approx(recommended)


def test_a_policy_that_is_dearer_than_full_depth_where_it_is_harmless_is_recommended_there_all_the_same() -> None:
    dear = [BudgetPoint(0.9, 1.0, 0.3, 0.7), BudgetPoint(1.1, 0.0, 0.04, 0.9), BudgetPoint(1.2, -1.0, 0.01, 0.95)]
    budgets = Budgets.of(dear)
    assert budgets.recommended <= 1.0
    assert budgets.divergence(budgets.recommended) <= HARMLESS
    assert budgets.price(1.0) == pytest.approx(1.0)
    assert Budgets.of(dear[1:]).recommended == 1.0


def test_the_recommended_budget_is_where_the_divergence_reaches_the_limit_between_two_points() -> None:
    points = [BudgetPoint(0.4, 1.0, 0.08, 0.9), BudgetPoint(0.5, 0.0, 0.02, 0.95)]
    budgets = Budgets.of(points)
    assert budgets.recommended == pytest.approx(0.45, abs=1e-5)
    assert budgets.divergence(budgets.recommended) <= HARMLESS
    assert Frontier(COSTS, (), budgets).recommended_budget == budgets.recommended
    assert (Budgets.of(points[1:]).recommended, Budgets.of(points[:1]).recommended) == (0.5, 0.4)


def test_a_policys_evaluations_count_in_its_budgets_and_in_a_replaced_table() -> None:
    policies = PolicyCatalog(COSTS, ALL_ACTIONS, Identity(), (trained("a", 0.5),))
    before = adaptive(policies, 0.8)
    policies.replace_costs(replace(COSTS, evaluation=0.01))
    after = adaptive(policies, 0.8)
    assert (before.costs.evaluation, after.costs.evaluation) == (0.0, 0.01)
    assert after.price > before.price  # seven evaluations leave less for the layers
    lowest = next(facts.lowest_budget for facts in policies.facts() if facts.name == "a")
    assert lowest == pytest.approx(0.5 + 7 * 0.01)
    assert after.state_costs is COSTS


def test_in_exact_the_cheapest_kernel_drafts_unless_a_policy_was_made_to_or_is_named() -> None:
    policies = [trained("a", 0.5), replace(trained("b", 0.4), is_drafter=True)]
    without, with_drafter = (
        PolicyCatalog(COSTS, ALL_ACTIONS, Identity(), own, 0.8) for own in (policies[:1], policies)
    )
    static = without.assign(SkipOptions(Mode.EXACT))
    assert static.policy.name == "static-int3"
    assert set(static.policy.pinned.values()) == {Action.INT3}
    assert static.drafting is not None
    assert with_drafter.assign(SkipOptions(Mode.EXACT)).policy.name == "b"
    assert adaptive(with_drafter, 0.7).policy.name == "a"
    named = without.assign(SkipOptions(Mode.EXACT, 0.6, "a", draft_length=3))
    assert named.policy.name == "a"
    assert named.policy.head is Action.INT8  # the cheapest, whatever the policy's own is
    assert named.drafting is not None
    assert set(named.drafting.verification_costs) == {1, 2, 3}


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
    with pytest.raises(ConfigError, match="any kernel"):
        CostTable(30, {Action.SKIP: 0.5}, {Action.FULL: 0.1})
