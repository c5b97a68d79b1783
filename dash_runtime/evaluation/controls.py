"""A policy and its controls on one text: cost, divergence and agreement, prompts at full depth.

The controls get the policy's own compensation, head and pinned layers. Random draws at the policy's own rates per
layer; the static ones take the same actions for every token, evenly spaced, or chosen by greedy search on divergence.
Knows rollouts; knows no files.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.policy.learned import LearnedPolicy
from dash_runtime.training.ppo import Outcome, Task
from dash_runtime.training.train import greedy_outcome, path_outcome

_SEARCH_SEQUENCES = 4


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. `cost_share` is of the full-depth token, head included."""

    name: str
    actions: tuple[str, ...]
    budget: float
    cost_share: float
    divergence: float
    agreement: float
    tokens: int

    def to_json(self) -> dict[str, object]:
        return asdict(self)


def evaluate(
    decoder: Decoder,
    policy: LearnedPolicy,
    sequences: Sequence[Sequence[int]],
    budgets: Sequence[float],
    num_prompt_tokens: int,
) -> list[Row]:
    """The policy at each budget, and the controls at the cost that it reached there."""
    task = Task(
        decoder,
        policy.actions,
        policy.pinned,
        policy.lookahead,
        policy.head,
        policy.compensation,
        policy.costs,
        num_prompt_tokens,
    )
    static_order = greedy_skip_order(task, sequences[:_SEARCH_SEQUENCES])
    rows: list[Row] = []
    names = tuple(action.name for action in policy.actions)
    num_tokens = int(task.decided_rows(sequences).sum())

    def add(name: str, budget: float, outcome: Outcome) -> None:
        rows.append(Row(name, names, budget, outcome.cost, outcome.divergence, outcome.agreement, num_tokens))

    for budget in budgets:
        learned, actions = greedy_outcome(task, policy.network, sequences, policy.calibration.price(budget))
        add(policy.name, budget, learned)
        add("random, same rates", budget, path_outcome(task, sequences, _random_choice(actions))[0])
        for name, order in (("static, greedy search", static_order), ("static, evenly spaced", _even_order(task))):
            count = _num_skips_for(task, learned.cost, order)
            add(name, budget, path_outcome(task, sequences, _static_choice(frozenset(order(count))))[0])
    return rows


SkipOrder = Callable[[int], Sequence[int]]
"""The layers to skip, given how many."""


def greedy_skip_order(task: Task, sequences: Sequence[Sequence[int]]) -> SkipOrder:
    """Adds, one after another, the layer whose skipping raises the divergence least (the ShortGPT kind)."""
    order: list[int] = []
    limit = len(task.free_layers) // 2
    while len(order) < limit:
        candidates = [layer for layer in task.free_layers if layer not in order]
        scored = [
            (path_outcome(task, sequences, _static_choice(frozenset((*order, layer))))[0].divergence, layer)
            for layer in candidates
        ]
        order.append(min(scored)[1])
    return lambda count: order[:count]


def _even_order(task: Task) -> SkipOrder:
    free = task.free_layers
    return lambda count: [free[int((place + 0.5) * len(free) / count)] for place in range(count)]


def _num_skips_for(task: Task, cost: float, order: SkipOrder) -> int:
    """How many skipped layers come nearest to `cost`; never fewer than none nor more than the order has."""
    saved = task.costs.layer[Action.FULL] - task.costs.layer[Action.SKIP]
    full = 1 - task.costs.head[Action.FULL] + task.costs.head[task.head]
    return max(0, min(round((full - cost) / saved), len(task.free_layers) // 2))


def _static_choice(skipped: frozenset[int]) -> Callable[[int, Tensor, Tensor, Tensor], Tensor]:
    def choose(layer: int, hidden: Tensor, last_actions: Tensor, spent: Tensor) -> Tensor:
        return torch.full((len(hidden),), int(Action.SKIP if layer in skipped else Action.FULL))

    return choose


def _random_choice(actions: Tensor) -> Callable[[int, Tensor, Tensor, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    shares = torch.stack([(actions == int(action)).float().mean(dim=1) for action in Action], dim=1)

    def choose(layer: int, hidden: Tensor, last_actions: Tensor, spent: Tensor) -> Tensor:
        return 1 + torch.multinomial(shares[layer], len(hidden), replacement=True, generator=generator)

    return choose
