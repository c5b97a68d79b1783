"""A policy and its controls on one text: cost, divergence and agreement, prompts at full depth.

The controls get the policy's own compensation, head and pinned layers, and the cost that it reached:

- random: draws at the policy's own rates per layer
- static: skips the same layers for every token, evenly spaced (Unified Layer Skipping) or chosen by greedy search on
  divergence (the ShortGPT kind), and runs the others in INT4 if the policy may. The compensation of the searched one
  can be refitted, as the policy's was.
- early exit: leaves out all layers from one on

Knows rollouts; knows no files.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.decoder.full_path import full_path
from dash_runtime.layers.compensation import Compensation
from dash_runtime.policy.learned import LearnedPolicy
from dash_runtime.policy.plan_spec import PlanSpec
from dash_runtime.rollout.choices import action_rates, random_choice, skip_choice
from dash_runtime.rollout.task import Outcome, Task, greedy_outcome, path_outcome


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. `cost_share` is a share of the full-depth token, head included.

    Only a policy has the last three: the divergence on text that it generated itself, its measured tokens per second
    over full depth's in the same run, and the share of that time spent on evaluating it.
    """

    name: str
    actions: tuple[str, ...]
    budget: float
    cost_share: float
    divergence: float
    agreement: float
    tokens: int
    free_running_divergence: float | None = None
    speedup: float | None = None
    policy_share: float | None = None

    def to_json(self) -> dict[str, object]:
        return asdict(self)


SkipOrder = Callable[[int], Sequence[int]]
"""Returns the layers to skip, given their number."""

RefitStatic = Callable[[Task, frozenset[int]], Compensation]
"""Returns the task's compensation refitted for tokens that all skip these layers."""


def policy_task(decoder: Decoder, policy: LearnedPolicy, num_prompt_tokens: int) -> Task:
    """Returns the task that the policy was trained for."""
    return Task(
        decoder=decoder, spec=policy.spec, compensation=policy.compensation, num_prompt_tokens=num_prompt_tokens
    )


class Evaluation:
    """One policy on one text, with its controls.

    The static plan is searched on `search_sequences`, and all figures are taken on `sequences`: keep the two apart.
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
        self._full = full_path(decoder, sequences)
        self._base = Action.INT4 if Action.INT4 in policy.spec.actions else Action.FULL
        self._search = greedy_skip_order(self.task, search_sequences, self._base)
        self._refit_static = refit_static
        self._num_tokens = int(self.task.decided_rows(sequences).sum())

    def learned(self, budget: float) -> tuple[Row, Tensor]:
        """Returns the policy's row at a budget, and its actions `[num_layers, decided rows]`."""
        price = self._policy.calibration.price(budget)
        outcome, actions = greedy_outcome(self.task, self._policy.network, self._sequences, price, self._full)
        return self._row(self._policy.name, budget, outcome), actions

    def controls(self, budget: float, cost: float, actions: Tensor) -> list[Row]:
        """Returns the controls nearest to the cost that the policy reached with these actions."""
        base = self._base.name
        rows = [self._row("random, same rates", budget, self._path(self.task, random_choice(action_rates(actions))))]
        count = _num_skips_for(self.task.spec, cost, self._base)
        searched = frozenset(self._search(count))
        for name, layers in (("greedy static", searched), ("even static", _even(self.task.spec, count))):
            outcome = self._path(self.task, skip_choice(layers, self._base))
            rows.append(self._row(f"{name} skips on {base}", budget, outcome))
        if self._refit_static is not None:
            refitted = replace(self.task, compensation=self._refit_static(self.task, searched))
            outcome = self._path(refitted, skip_choice(searched, self._base))
            rows.append(self._row(f"greedy static skips on {base}, refitted", budget, outcome))
        exiting = _early_exit(self.task, cost)
        skips_rest = skip_choice(frozenset(exiting.spec.free_layers), self._base)
        rows.append(self._row("early exit", budget, self._path(exiting, skips_rest)))
        return rows

    def _path(self, task: Task, choose: Callable[..., Tensor]) -> Outcome:
        return path_outcome(task, self._sequences, choose, self._full)[0]

    def _row(self, name: str, budget: float, outcome: Outcome) -> Row:
        names = tuple(action.name for action in self._policy.spec.actions)
        return Row(name, names, budget, outcome.cost, outcome.divergence, outcome.agreement, self._num_tokens)


def greedy_skip_order(task: Task, sequences: Sequence[Sequence[int]], base: Action) -> SkipOrder:
    """Adds one layer after another: the one whose skipping raises the divergence least (the ShortGPT kind)."""
    order: list[int] = []
    full = full_path(task.decoder, sequences)

    def divergence(layer: int) -> float:
        return path_outcome(task, sequences, skip_choice(frozenset((*order, layer)), base), full)[0].divergence

    def first(count: int) -> list[int]:
        while len(order) < count:
            order.append(min(set(task.spec.free_layers) - set(order), key=divergence))
        return order[:count]

    return first


def _even(spec: PlanSpec, count: int) -> frozenset[int]:
    free = spec.free_layers
    return frozenset(free[int((place + 0.5) * len(free) / count)] for place in range(count))


def _early_exit(task: Task, cost: float) -> Task:
    """Returns the task whose last layers are free, as many as bring the cost nearest to `cost` if all are skipped."""
    spec, layer, num_layers = task.spec, task.spec.costs.layer, task.spec.num_layers
    rest = spec.costs.head[spec.head] + spec.costs.fixed

    def distance(exit_layer: int) -> float:
        left = exit_layer * layer[spec.pinned_action] + (num_layers - exit_layer) * layer[Action.SKIP]
        return abs(left + rest - cost)

    exit_layer = min(range(spec.lookahead, num_layers + 1), key=distance)
    return replace(task, spec=replace(spec, pinned=frozenset(range(exit_layer)), block_size=num_layers))


def _num_skips_for(spec: PlanSpec, cost: float, base: Action) -> int:
    """Returns the number of skipped layers that comes nearest to `cost`, with `base` in the others."""
    layer, free = spec.costs.layer, len(spec.free_layers)
    pinned = spec.num_layers - free
    unskipped = pinned * layer[spec.pinned_action] + free * layer[base] + spec.costs.head[spec.head] + spec.costs.fixed
    count = round((unskipped - cost) / (layer[base] - layer[Action.SKIP]))
    return max(0, min(count, free))
