"""Which policy serves a request: from its skip options to a policy, a price and a cost table.

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
"""For an engine whose device was not measured."""
RANDOM_BUDGET = 0.8
"""Low enough to show what a policy saves; there is no budget at which random actions are good."""


@dataclass(frozen=True, slots=True)
class Drafting:
    """What drafts and verifications cost on this device, as shares of one full-depth token."""

    costs: CostTable
    draft_cost: float
    """Expected of a token, until some were drafted."""
    verification_costs: Mapping[int, float]
    """Of the pass that verifies a draft, for each length that it may be given, in ascending order."""
    least_gain: float
    """Expected of a draft, or full depth goes on alone."""

    def verification_cost(self, length: int) -> float:
        """Of a draft of any length: that of the next longer one, as one that ended early is."""
        return next(cost for longer, cost in self.verification_costs.items() if longer >= length)


@dataclass(frozen=True, slots=True)
class Assignment:
    """Who decides for one sequence, at which price, and by which cost table it is accounted."""

    policy: Policy
    costs: CostTable
    price: float = 1.0
    compute_budget: float | None = None
    drafting: Drafting | None = None
    """In mode EXACT."""


class PolicyCatalog:
    """The policies of one model on one device.

    Args:
        costs: the device's own table, for the policies that have none in a file.
        actions: those with a kernel here.
        compensation: for the policies that have none in a file.
        learned: the trained ones; the first is the default policy.
        default_compute_budget: where a request sets none in mode ADAPTIVE; None: what its policy recommends.
        verification_costs: of verifying a draft, by its length, as shares of a full-depth token.
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
        self._costs = costs
        self._actions = actions
        self._compensation = compensation
        self._learned = {policy.name: policy for policy in learned}
        self._default_compute_budget = default_compute_budget
        self._verification_costs = verification_costs
        self._least_drafting_gain = least_drafting_gain
        self.full_depth = Assignment(FullDepth(costs.num_layers), costs)
        self._fixed: dict[Action, FixedPlan] = {
            action: fixed_action_plan(action, costs, compensation, tuple(costs.head)) for action in actions
        }
        self._head = min(costs.head, key=lambda precision: costs.head[precision])
        # Full depth has the last word on a draft, so that the cheapest head will do.
        self._drafters = {
            name: replace(policy, spec=replace(policy.spec, head=self._head)) for name, policy in self._learned.items()
        }
        self._random = lru_cache(maxsize=256)(self._make_random)
        self._static = self._make_static()
        self._facts = self._describe()

    def assign(self, skip: SkipOptions) -> Assignment:
        """The assignment for validated options; an unset budget is the default one, raised to what the
        policy can keep."""
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
        """What a token of the policy costs on this device where it skips nothing."""
        cheapest = min((a for a in policy.action_costs if a is not Action.SKIP), key=lambda a: self._costs.layer[a])
        return self._costs.token_cost((cheapest,) * self._costs.num_layers, self._head)

    def _make_static(self) -> FixedPlan | None:
        """The cheapest kernel for every layer, the edges too: a drafter that costs nothing to ask."""
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
        """What callers may ask for, the default first."""
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
