"""Chooses the policy, the price and the cost table that serve a request, by its skip options.

Knows policies and budgets; knows no sequences and no device.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from dash_runtime.actions import Action, CostTable
from dash_runtime.config import Mode, PolicyFacts, SkipOptions, find_policy
from dash_runtime.layers.compensation import Compensation
from dash_runtime.policy.budget import lowest_random_budget, random_plan_for_budget
from dash_runtime.policy.draft_length import LEAST_GAIN
from dash_runtime.policy.learned import LearnedPolicy
from dash_runtime.policy.policy import FixedPlan, FullDepth, Policy, edges, fixed_action_plan

STATIC_NOTE = "not a learned policy: every layer runs in {action}, for every token"
RANDOM_NOTE = (
    "not a learned policy: actions are drawn at random, at rates that keep the compute budget; "
    "expect worse text than from a learned policy at the same budget"
)


USUAL_VERIFICATION_COSTS = {1: 1.2, 3: 1.3, 7: 1.4, 15: 1.6}
"""Verification costs by draft length, for an engine whose device was not measured."""
RANDOM_BUDGET = 0.8
"""Low enough to show what a policy saves. Random actions are good at no budget."""


@dataclass(frozen=True, slots=True)
class Drafting:
    """The costs of drafts and verifications on this device, as shares of one full-depth token."""

    costs: CostTable
    draft_cost: float
    """Expected cost of a drafted token, until some were drafted."""
    verification_costs: Mapping[int, float]
    """Cost of the verifying pass by draft length, for each length that a draft may have, ascending."""
    least_gain: float
    """Expected speed over full depth's below which nothing is drafted."""

    def verification_cost(self, length: int) -> float:
        """Returns the cost for any length: that of the next longer draft, since a draft may end early."""
        return next(cost for longer, cost in self.verification_costs.items() if longer >= length)


@dataclass(frozen=True, slots=True)
class Assignment:
    """The policy of one sequence, its price, and the cost table that accounts for it."""

    policy: Policy
    costs: CostTable
    price: float = 1.0
    compute_budget: float | None = None
    drafting: Drafting | None = None
    """Set in mode EXACT only."""


class PolicyCatalog:
    """The policies of one model on one device.

    Args:
        costs: the device's own table, for policies without a file.
        actions: the actions with a kernel here.
        compensation: for policies without a file.
        learned: the trained policies; the first is the default one.
        default_compute_budget: for requests in mode ADAPTIVE that set none; None for the policy's recommendation.
        verification_costs: cost of verifying a draft by its length, as shares of a full-depth token.
        least_drafting_gain: the speed over full depth's below which EXACT does not draft.
    """

    def __init__(
        self,
        costs: CostTable,
        actions: tuple[Action, ...],
        compensation: Compensation,
        learned: Sequence[LearnedPolicy],
        default_compute_budget: float | None = None,
        verification_costs: Mapping[int, float] = USUAL_VERIFICATION_COSTS,
        least_drafting_gain: float = LEAST_GAIN,
    ) -> None:
        self._actions = actions
        self._compensation = compensation
        self._learned = {policy.name: policy for policy in learned}
        self._default_compute_budget = default_compute_budget
        self._verification_costs = verification_costs
        self._least_drafting_gain = least_drafting_gain
        self.replace_costs(costs)

    def replace_costs(self, costs: CostTable) -> None:
        """Takes another table of this device for requests that begin from now on; running ones keep theirs."""
        self._costs = costs
        self.full_depth = Assignment(FullDepth(costs.num_layers), costs)
        self._fixed: dict[Action, FixedPlan] = {
            action: fixed_action_plan(action, costs, self._compensation, tuple(costs.head)) for action in self._actions
        }
        self._head = min(costs.head, key=lambda precision: costs.head[precision])
        # Full depth has the last word on a draft, so the cheapest head will do.
        self._drafters = {
            name: replace(policy, spec=replace(policy.spec, head=self._head)) for name, policy in self._learned.items()
        }
        self._random = lru_cache(maxsize=256)(self._make_random)
        self._static = self._make_static()
        self._facts = self._describe()

    def assign(self, skip: SkipOptions) -> Assignment:
        """Returns the assignment for validated options. An unset budget is the default one, raised to the policy's
        lowest."""
        if skip.mode is Mode.FULL_DEPTH:
            return self.full_depth
        if skip.mode is Mode.FIXED:
            assert skip.fixed_action is not None
            return Assignment(self._fixed[skip.fixed_action], self._costs)
        chosen = find_policy(self._facts, skip.policy_name, skip.mode)
        budget = skip.compute_budget or chosen.default_budget(skip.mode, self._default_compute_budget)
        policies = self._learned if skip.mode is Mode.ADAPTIVE else self._drafters
        if learned := policies.get(chosen.name):
            assignment = Assignment(learned, learned.costs, learned.calibration.price(budget), budget)
        elif self._static is not None and chosen.name == self._static.name:
            assignment = Assignment(self._static, self._costs, compute_budget=budget)
        else:
            assignment = self._random(budget)
        if skip.mode is Mode.ADAPTIVE:
            return assignment
        longest = skip.draft_length or max(self._verification_costs, default=0)
        lengths = {length: cost for length, cost in self._verification_costs.items() if length <= longest}
        draft_cost = min(budget, self._unskipped_cost(chosen))
        drafting = Drafting(self._costs, draft_cost, lengths, self._least_drafting_gain)
        return replace(assignment, drafting=drafting)

    def _unskipped_cost(self, policy: PolicyFacts) -> float:
        """Returns the cost on this device of a token for which the policy skips nothing."""
        cheapest = min((a for a in policy.action_costs if a is not Action.SKIP), key=lambda a: self._costs.layer[a])
        return self._costs.token_cost((cheapest,) * self._costs.num_layers, self._head)

    def _make_static(self) -> FixedPlan | None:
        """Returns the cheapest kernel for every layer, edges included: a drafter that needs no decisions.

        None if FULL is the cheapest.
        """
        kernels = [action for action in self._actions if action is not Action.SKIP]
        cheapest = min(kernels, key=lambda action: self._costs.layer[action])
        if cheapest is Action.FULL:
            return None
        layers = range(self._costs.num_layers)
        name = f"static-{cheapest.name.lower()}"
        return FixedPlan(
            plan=(cheapest,) * len(layers),
            name=name,
            head=self._head,
            compensation=self._compensation,
            pinned=frozenset(layers),
            pinned_action=cheapest,
        )

    def facts(self) -> tuple[PolicyFacts, ...]:
        """Returns the policies that callers may name, the default first."""
        return self._facts

    def _describe(self) -> tuple[PolicyFacts, ...]:
        costs = self._costs
        random = PolicyFacts(
            name="random",
            note=RANDOM_NOTE,
            learned=False,
            lookahead=1,
            pinned_layers=tuple(sorted(edges(costs.num_layers))),
            action_costs=_relative_costs(costs, self._actions),
            lowest_budget=lowest_random_budget(costs, self._actions, self._head),
            recommended_budget=RANDOM_BUDGET,
            compensation=self._compensation.kind.value,
        )
        learned = (
            PolicyFacts(
                name=policy.name,
                note="",
                learned=True,
                lookahead=policy.lookahead,
                pinned_layers=tuple(sorted(policy.pinned)),
                action_costs=_relative_costs(policy.costs, policy.spec.actions),
                lowest_budget=policy.calibration.lowest_budget,
                recommended_budget=policy.calibration.recommended_budget,
                compensation=policy.compensation.kind.value,
                is_drafter=policy.is_drafter,
            )
            for policy in self._learned.values()
        )
        static = []
        if (plan := self._static) is not None:
            action = plan.pinned_action
            cost = costs.token_cost(plan.plan, plan.head)
            static.append(
                PolicyFacts(
                    name=plan.name,
                    note=STATIC_NOTE.format(action=action.name),
                    learned=False,
                    lookahead=1,
                    pinned_layers=tuple(range(costs.num_layers)),
                    action_costs=_relative_costs(costs, (action,)),
                    lowest_budget=min(cost, 1.0),
                    recommended_budget=min(cost, 1.0),
                    compensation=self._compensation.kind.value,
                    is_drafter=True,
                )
            )
        return (*learned, random, *static)

    def _make_random(self, budget: float) -> Assignment:
        plan = random_plan_for_budget(budget, self._costs, self._actions, self._head, self._compensation)
        return Assignment(plan, self._costs, compute_budget=budget)


def _relative_costs(costs: CostTable, actions: tuple[Action, ...]) -> dict[Action, float]:
    return {action: costs.layer[action] / costs.layer[Action.FULL] for action in actions}
