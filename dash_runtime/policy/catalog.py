"""Chooses the policy, the price and the cost table that serve a request, by its skip options.

Knows policies and budgets; knows no sequences and no device.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from dash_runtime.actions import Action, CostTable
from dash_runtime.config import Mode, PolicyFacts, SkipOptions, find_policy
from dash_runtime.layers.compensation import Compensation
from dash_runtime.policy.draft_length import LEAST_GAIN, MOST_BY_TEXT, USUAL_SECOND_ROW, every_length
from dash_runtime.policy.fixed_plans import MeasuredPlan
from dash_runtime.policy.frontier import Frontier
from dash_runtime.policy.learned import LearnedPolicy
from dash_runtime.policy.policy import FixedPlan, Policy, cheapest_kernel, fixed_action_plan, full_depth

FRONTIER = "frontier"
"""The name under which callers find what ADAPTIVE runs if they name no policy."""
FRONTIER_NOTE = "{}fixed plans: what diverges least from full depth within the budget; every answer names what ran"
STATIC_NOTE = "not a learned policy: every layer runs in {action}, for every token"
PLAN_NOTE = "not a learned policy: a fixed plan, the same for every token, and the best one known within this budget"

USUAL_VERIFICATION_COSTS = {1: 1.2, 3: 1.3, 7: 1.4, 15: 1.6}
"""Verification costs by draft length, for an engine whose device was not measured."""


@dataclass(frozen=True, slots=True)
class Drafting:
    """The costs of drafts and verifications on this device, as shares of one full-depth token."""

    draft_cost: float
    """Expected cost of a drafted token, until some were drafted."""
    verification_costs: Mapping[int, float]
    """Cost of the verifying pass for each length that a draft may have, ascending from 1."""
    least_gain: float
    """Expected speed over full depth's below which nothing is drafted."""
    second_row: float
    """The cost that a second row adds to a drafting pass, as a share of the first."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """The policy of one sequence, its price, and the device's cost table when the sequence began, which accounts for
    it."""

    policy: Policy
    costs: CostTable
    price: float = 1.0
    compute_budget: float | None = None
    drafting: Drafting | None = None
    """Set in mode EXACT only."""
    note: str = ""
    """What a caller should know about the policy."""
    divergence: float | None = None
    """The policy's divergence from full depth at this budget, in nats per token, on the text of its calibration; None:
    nobody knows."""
    prefill_action: Action | None = None
    """The action of the prompt's tokens in all layers; None: the highest."""

    @property
    def is_planned(self) -> bool:
        """True if the policy decides nothing: its plan is the same for every token."""
        return len(self.policy.pinned) == self.costs.num_layers

    @property
    def state_costs(self) -> CostTable:
        """The table by which the policy is told the cost spent: a learned one's own."""
        return self.policy.costs if isinstance(self.policy, LearnedPolicy) else self.costs


class Catalog(Protocol):
    """Says what decides a request's actions."""

    full_depth: Assignment

    def assign(self, skip: SkipOptions) -> Assignment: ...


class PolicyCatalog:
    """The policies of one model on one device.

    Args:
        costs: the device's own table.
        actions: the actions with a kernel here.
        compensation: for policies without a file.
        learned: the trained policies; the first is the default one.
        default_compute_budget: for requests in mode ADAPTIVE that set none; None for the policy's recommendation.
        verification_costs: cost of verifying a draft by its length, as shares of a full-depth token, of some lengths.
        least_drafting_gain: the speed over full depth's below which EXACT does not draft.
        second_row: what a second row adds to a drafting pass, as a share of the first.
        plans: fixed plans searched on this device with `compensation`; not used if the default policy brings its own,
            whose divergences are of the same text as its own.
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
        plans: Sequence[MeasuredPlan] = (),
        second_row: float = USUAL_SECOND_ROW,
    ) -> None:
        self._actions = actions
        self._compensation = compensation
        self._learned = {policy.name: policy for policy in learned}
        self._best = next((policy for policy in learned if not policy.is_drafter), None)
        self._plans = tuple(plans)
        self._plan_compensation = compensation
        if self._best is not None and self._best.plans:
            self._plans, self._plan_compensation = self._best.plans, self._best.compensation
        self._default_compute_budget = default_compute_budget
        self._verification_costs = every_length(verification_costs)
        self._least_drafting_gain = least_drafting_gain
        self._second_row = second_row
        self._prefill_action: Action | None = None
        self.replace_costs(costs)

    @property
    def verification_costs(self) -> Mapping[int, float]:
        """Cost of verifying a draft by its length, as shares of a full-depth token."""
        return self._verification_costs

    def learn(
        self,
        *,
        compensation: Compensation | None = None,
        plans: Sequence[MeasuredPlan] | None = None,
        verification_costs: Mapping[int, float] | None = None,
        second_row: float | None = None,
        prefill_action: Action | None = None,
    ) -> None:
        """Takes what was measured since: `prefill_action` is for the prompts of those who are not at full depth.
        Assignments that were made before keep what they have."""
        has_own_plans = self._best is not None and bool(self._best.plans)
        if compensation is not None:
            self._compensation = compensation
        if not has_own_plans:
            self._plans = self._plans if plans is None else tuple(plans)
            self._plan_compensation = self._compensation
        if verification_costs is not None:
            self._verification_costs = every_length(verification_costs)
        self._second_row = self._second_row if second_row is None else second_row
        self._prefill_action = prefill_action or self._prefill_action
        self.replace_costs(self._costs)

    def replace_costs(self, costs: CostTable) -> None:
        """Takes another table of the same device. Assignments that were made before keep theirs."""
        self._costs = costs
        heads, highest = tuple(costs.head), costs.highest
        self._fixed = {
            action: fixed_action_plan(action, costs.num_layers, self._compensation, heads, highest)
            for action in self._actions
        }
        self.full_depth = Assignment(full_depth(costs.num_layers, costs.highest, max(costs.head)), costs)
        self._head = min(costs.head, key=lambda precision: costs.head[precision])
        budgets = None if self._best is None else self._best.budgets(costs)
        self._frontier = Frontier(costs, self._plans, budgets)
        self._made_plans: dict[str, FixedPlan] = {}
        # Full depth has the last word on a draft, so the cheapest head will do.
        self._drafters = {
            name: replace(policy, spec=replace(policy.spec, head=self._head)) for name, policy in self._learned.items()
        }
        self._static = self._make_static()
        self._facts = self._describe()

    def assign(self, skip: SkipOptions) -> Assignment:
        """Returns the assignment for validated options. An unset budget is the default one; the policy's lowest is
        the least."""
        if skip.mode is Mode.FULL_DEPTH:
            return self.full_depth
        if skip.mode is Mode.FIXED:
            assert skip.fixed_action is not None
            return self._with_prompt(Assignment(self._fixed[skip.fixed_action], self._costs))
        chosen = find_policy(self._facts, skip.policy_name, skip.mode)
        asked = skip.compute_budget or chosen.default_budget(skip.mode, self._default_compute_budget)
        budget = max(asked, chosen.lowest_budget)
        if policy := self._learned.get(chosen.name):
            assignment = self._assign_learned(policy, budget)
        elif self._static is not None and chosen.name == self._static.name:
            assignment = Assignment(self._static, self._costs, compute_budget=budget, note=chosen.note)
        else:
            assignment = self._assign_best(budget)
        if skip.mode is Mode.EXACT:
            return self._drafting(assignment, skip, budget)
        return self._with_prompt(assignment)

    def _with_prompt(self, assignment: Assignment) -> Assignment:
        """Lets the prompt of whoever is not at full depth run in another action."""
        is_full_depth = assignment.policy.pinned == self.full_depth.policy.pinned
        return assignment if is_full_depth else replace(assignment, prefill_action=self._prefill_action)

    def _assign_learned(self, policy: LearnedPolicy, budget: float) -> Assignment:
        budgets = policy.budgets(self._costs)
        divergence = budgets.divergence(budget)
        return Assignment(policy, self._costs, budgets.price(budget), budget, divergence=divergence)

    def _assign_best(self, budget: float) -> Assignment:
        choice = self._frontier.within(budget)
        if choice.plan is None:
            assert self._best is not None
            return Assignment(self._best, self._costs, choice.price, budget, divergence=choice.divergence)
        plan = choice.plan
        # One object for one plan: rows of a batch with the same policy are decided together.
        made = self._made_plans.setdefault(
            plan.name, FixedPlan(plan.actions, plan.name, plan.head, self._plan_compensation)
        )
        return Assignment(made, self._costs, compute_budget=budget, note=PLAN_NOTE, divergence=plan.divergence)

    def _drafting(self, assignment: Assignment, skip: SkipOptions, budget: float) -> Assignment:
        """Returns the assignment of a drafter: with the cheapest head and the costs of verifying."""
        policy = assignment.policy
        if isinstance(policy, LearnedPolicy):
            policy = self._drafters[policy.name]
        elif isinstance(policy, FixedPlan) and policy.head is not self._head:
            policy = self._made_plans.setdefault(
                f"{policy.name} with the cheapest head", replace(policy, head=self._head)
            )
        longest = min(MOST_BY_TEXT, skip.draft_length or MOST_BY_TEXT)
        lengths = {length: cost for length, cost in self._verification_costs.items() if length <= longest}
        draft_cost = min(budget, self._unskipped_cost(policy))
        drafting = Drafting(draft_cost, lengths, self._least_drafting_gain, self._second_row)
        return replace(assignment, policy=policy, drafting=drafting)

    def _unskipped_cost(self, policy: Policy) -> float:
        """Returns the cost on this device of a token for which the policy skips nothing."""
        actions = {*policy.score_actions, *policy.pinned.values()} - {Action.SKIP} or {self._costs.highest}
        cheapest = min(actions, key=lambda action: self._costs.layer[action])
        return self._draft_cost(cheapest, policy.num_evaluations)

    @property
    def usual_draft_cost(self) -> float:
        """The cost of a token that the cheapest kernel drafts."""
        return self._draft_cost(cheapest_kernel(self._actions))

    def _draft_cost(self, action: Action, num_evaluations: int = 0) -> float:
        """Returns the cost of a token with this action in all layers and the cheapest head."""
        return self._costs.token_cost((action,) * self._costs.num_layers, self._head, num_evaluations)

    def _make_static(self) -> FixedPlan | None:
        """Returns the cheapest kernel for every layer: a drafter that needs no decisions. None if that is full
        depth's."""
        kernels = [action for action in self._actions if action is not Action.SKIP]
        cheapest = min(kernels, key=lambda action: self._costs.layer[action])
        if cheapest is self._costs.highest:
            return None
        name = f"static-{cheapest.name.lower()}"
        return FixedPlan((cheapest,) * self._costs.num_layers, name, self._head, self._compensation)

    def facts(self) -> tuple[PolicyFacts, ...]:
        """Returns the policies that callers may name, the default first."""
        return self._facts

    def _describe(self) -> tuple[PolicyFacts, ...]:
        costs, best = self._costs, self._best
        layers = tuple(range(costs.num_layers))
        frontier = PolicyFacts(
            name=FRONTIER,
            note=FRONTIER_NOTE.format("" if best is None else f"the learned policy {best.name} and "),
            learned=best is not None,
            lookahead=1 if best is None else best.lookahead,
            pinned_layers=layers if best is None else tuple(sorted(best.pinned)),
            action_costs=_relative_costs(costs, self._actions),
            lowest_budget=self._frontier.lowest_budget,
            recommended_budget=self._frontier.recommended_budget,
            compensation=self._plan_compensation.kind.value,
        )
        learned = (
            PolicyFacts(
                name=policy.name,
                note="",
                learned=True,
                lookahead=policy.lookahead,
                pinned_layers=tuple(sorted(policy.pinned)),
                action_costs=_relative_costs(costs, policy.spec.actions),
                lowest_budget=policy.budgets(costs).lowest,
                recommended_budget=policy.recommended_budget(costs),
                compensation=policy.compensation.kind.value,
                is_drafter=policy.is_drafter,
            )
            for policy in self._learned.values()
        )
        static = []
        if (plan := self._static) is not None:
            action = plan.plan[0]
            cost = min(1.0, costs.token_cost(plan.plan, plan.head))
            static.append(
                PolicyFacts(
                    name=plan.name,
                    note=STATIC_NOTE.format(action=action.name),
                    learned=False,
                    lookahead=1,
                    pinned_layers=layers,
                    action_costs=_relative_costs(costs, (action,)),
                    lowest_budget=cost,
                    recommended_budget=cost,
                    compensation=self._compensation.kind.value,
                    is_drafter=True,
                )
            )
        return (frontier, *learned, *static)


def _relative_costs(costs: CostTable, actions: tuple[Action, ...]) -> dict[Action, float]:
    return {action: costs.layer[action] / costs.layer[costs.highest] for action in actions}
