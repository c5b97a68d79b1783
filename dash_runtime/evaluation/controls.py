"""A policy and its controls on one text: cost, divergence and agreement, prompts at full depth.

The controls get the policy's own compensation, its cost table and the cost that it reached:

- random: draws at the policy's own rates per layer
- fixed: the same plan for every token, searched with every action of the device in any layer (`plan_search.py`); beside
  the best one at the policy's cost, each kernel in all layers. The compensation of a plan with skips can be refitted,
  as the policy's was.
- static: fixed plans too, of the policy's own actions only: the best one of a search, and evenly spaced skips (Unified
  Layer Skipping)
- early exit: leaves out all layers from one on

Knows rollouts; knows no files.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum

from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.decoder.full_path import full_outputs
from dash_runtime.layers.compensation import Compensation
from dash_runtime.policy.fixed_plans import MeasuredPlan
from dash_runtime.policy.learned import LearnedPolicy
from dash_runtime.policy.policy import Actions
from dash_runtime.rollout.choices import action_rates, no_choice, random_choice
from dash_runtime.rollout.rollout import Choose
from dash_runtime.rollout.task import Outcome, Task, greedy_outcome, path_outcome
from dash_runtime.startup.plan_search import search_plans


class RowKind(StrEnum):
    """The source of the actions of a row of the table."""

    POLICY = "policy"
    FIXED = "fixed"
    STATIC = "static"
    RANDOM = "random"
    EARLY_EXIT = "early_exit"

    @property
    def is_fixed_plan(self) -> bool:
        """True if every token gets the same plan."""
        return self in (RowKind.FIXED, RowKind.STATIC, RowKind.EARLY_EXIT)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. `cost_share` is a share of the full-depth token, head and evaluations included.

    `dominated` is True if a fixed plan of the same table costs no more and diverges no more. Only a policy has the last
    three: the divergence on text that it generated itself, its measured tokens per second over full depth's in the same
    run, and the share of that time spent on evaluating it.
    """

    name: str
    kind: RowKind
    actions: tuple[str, ...]
    budget: float
    cost_share: float
    divergence: float
    agreement: float
    tokens: int
    dominated: bool = False
    free_running_divergence: float | None = None
    speedup: float | None = None
    policy_share: float | None = None

    def to_json(self) -> dict[str, object]:
        return asdict(self)


def with_dominated(rows: Sequence[Row]) -> list[Row]:
    """Returns the rows of one table with `dominated` set."""
    plans = [row for row in rows if row.kind.is_fixed_plan]

    def is_beaten(row: Row) -> bool:
        own = (row.cost_share, row.divergence)
        return any(
            plan.cost_share <= own[0]
            and plan.divergence <= own[1]
            and ((plan.cost_share, plan.divergence) != own or not row.kind.is_fixed_plan)
            for plan in plans
        )

    return [replace(row, dominated=is_beaten(row)) for row in rows]


RefitStatic = Callable[[Task, frozenset[int]], Compensation]
"""Returns the task's compensation refitted for tokens that all skip these layers."""


def policy_task(decoder: Decoder, policy: LearnedPolicy, num_prompt_tokens: int) -> Task:
    """Returns the task that the policy was trained for."""
    return Task(
        decoder=decoder, spec=policy.spec, compensation=policy.compensation, num_prompt_tokens=num_prompt_tokens
    )


class Evaluation:
    """One policy on one text, with its controls.

    Plans are searched on `search_sequences`, and all figures are taken on `sequences`: keep the two apart.
    """

    def __init__(
        self,
        decoder: Decoder,
        policy: LearnedPolicy,
        sequences: Sequence[Sequence[int]],
        search_sequences: Sequence[Sequence[int]],
        num_prompt_tokens: int,
        refit_static: RefitStatic | None = None,
    ) -> None:
        self.task = policy_task(decoder, policy, num_prompt_tokens)
        self._policy = policy
        self._sequences = sequences
        self._full = full_outputs(decoder, sequences)
        self._refit_static = refit_static
        self._num_tokens = int(self.task.decided_rows(sequences).sum())
        self._plans = search_plans(self.task, search_sequences, max_plans=None)
        self._static: tuple[MeasuredPlan, ...] = ()
        if set(policy.spec.actions) < set(decoder.actions):
            own = {*policy.spec.actions, Action.FULL}
            self._static = search_plans(self.task, search_sequences, (policy.head,), own, max_plans=None)

    def learned(self, budget: float) -> tuple[Row, Tensor]:
        """Returns the policy's row at a budget, and its actions `[num_layers, decided rows]`."""
        price = self._policy.budgets(self._policy.costs).price(budget)
        outcome, actions = greedy_outcome(self.task, self._policy.network, self._sequences, price, self._full)
        return self._row(self._policy.name, RowKind.POLICY, self.task.spec.actions, budget, outcome), actions

    def uniform(self) -> list[Row]:
        """Returns each kernel in all layers, at its own cost."""
        plans = [plan for plan in self._plans if len(set(plan.actions)) == 1]
        return [self._plan(plan.name, RowKind.FIXED, plan.actions, plan.head, None) for plan in plans]

    def controls(self, budget: float, cost: float, actions: Tensor) -> list[Row]:
        """Returns the controls nearest to the cost that the policy reached with these actions; the best of the fixed
        plans costs no more."""
        costs, head = self.task.spec.costs, self.task.spec.head
        outcome = self._path(self.task, random_choice(action_rates(actions)))
        rows = [self._row("random, same rates", RowKind.RANDOM, self.task.spec.actions, budget, outcome)]
        within = [plan for plan in self._plans if plan.cost(costs) <= cost]
        best = min(within, key=lambda plan: plan.divergence, default=self._plans[0])
        rows += self._with_refit(best.name, RowKind.FIXED, best.actions, best.head, budget)
        if self._static:
            nearest = min(self._static, key=lambda plan: abs(plan.cost(costs) - cost))
            rows += self._with_refit("best plan of its actions", RowKind.STATIC, nearest.actions, head, budget)
        even = _even(self.task, cost)
        rows.append(self._plan("evenly spaced skips", RowKind.STATIC, even, head, budget))
        rows.append(self._plan("early exit", RowKind.EARLY_EXIT, _early_exit(self.task, cost), head, budget))
        return rows

    def _with_refit(self, name: str, kind: RowKind, plan: Actions, head: Action, budget: float) -> Iterable[Row]:
        yield self._plan(name, kind, plan, head, budget)
        skipped = frozenset(layer for layer, action in enumerate(plan) if action is Action.SKIP)
        if self._refit_static is not None and skipped:
            refitted = replace(self.task, compensation=self._refit_static(self.task, skipped))
            yield self._plan(f"{name}, refitted", kind, plan, head, budget, refitted)

    def _plan(
        self, name: str, kind: RowKind, plan: Actions, head: Action, budget: float | None, task: Task | None = None
    ) -> Row:
        outcome = self._path((task or self.task).fixed(plan, head))
        return self._row(name, kind, plan, outcome.cost if budget is None else budget, outcome)

    def _path(self, task: Task, choose: Choose = no_choice) -> Outcome:
        return path_outcome(task, self._sequences, choose, self._full)[0]

    def _row(self, name: str, kind: RowKind, actions: Iterable[Action], budget: float, outcome: Outcome) -> Row:
        names = tuple(action.name for action in sorted(set(actions)))
        return Row(name, kind, names, budget, outcome.cost, outcome.divergence, outcome.agreement, self._num_tokens)


def _even(task: Task, cost: float) -> Actions:
    """Returns evenly spaced skips, as many as come nearest to `cost`, with INT4 or FULL in the other free layers."""
    spec, layer = task.spec, task.spec.costs.layer
    base = Action.INT4 if Action.INT4 in spec.actions else Action.FULL
    unskipped = tuple(spec.pinned.get(place, base) for place in range(spec.num_layers))
    saved = layer[base] - layer[Action.SKIP]
    count = round((spec.costs.token_cost(unskipped, spec.head) - cost) / saved) if saved > 0 else 0
    free = spec.free_layers
    count = max(0, min(count, len(free)))
    skipped = {free[int((place + 0.5) * len(free) / count)] for place in range(count)}
    return tuple(Action.SKIP if place in skipped else action for place, action in enumerate(unskipped))


def _early_exit(task: Task, cost: float) -> Actions:
    """Returns the plan that skips all layers from one on, as many as bring the cost nearest to `cost`."""
    spec = task.spec

    def leaving(exit_layer: int) -> Actions:
        return (Action.FULL,) * exit_layer + (Action.SKIP,) * (spec.num_layers - exit_layer)

    plans = [leaving(exit_layer) for exit_layer in range(1, spec.num_layers + 1)]
    return min(plans, key=lambda plan: abs(spec.costs.token_cost(plan, spec.head) - cost))
