"""A policy and its controls on one text: cost, divergence and agreement, prompts at full depth.

The controls get the policy's own compensation, head and pinned layers. Random draws at the policy's own rates per
layer. The static ones skip the same layers for every token, evenly spaced or chosen by greedy search on divergence,
and run the others in INT4 where the policy may, as a static plan at that cost would. Knows rollouts; knows no files.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.policy.learned import LearnedPolicy
from dash_runtime.training.ppo import Outcome, Task
from dash_runtime.training.rollout import Choose, full_path
from dash_runtime.training.train import greedy_outcome, path_outcome


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
    search_sequences: Sequence[Sequence[int]],
    budgets: Sequence[float],
    num_prompt_tokens: int,
) -> list[Row]:
    """The policy at each budget, and the controls nearest to the cost that it reached there.

    The static plan is searched on `search_sequences`; all figures are of `sequences`, so keep the two apart.
    """
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
    base = Action.INT4 if Action.INT4 in policy.actions else Action.FULL
    orders = {
        f"greedy skips on {base.name}": greedy_skip_order(task, search_sequences, base),
        f"even skips on {base.name}": _even_order(task),
    }
    rows: list[Row] = []
    names = tuple(action.name for action in policy.actions)
    num_tokens = int(task.decided_rows(sequences).sum())

    def add(name: str, budget: float, outcome: Outcome) -> None:
        rows.append(Row(name, names, budget, outcome.cost, outcome.divergence, outcome.agreement, num_tokens))

    for budget in budgets:
        learned, actions = greedy_outcome(task, policy.network, sequences, policy.calibration.price(budget))
        add(policy.name, budget, learned)
        add("random, same rates", budget, path_outcome(task, sequences, _random_choice(actions))[0])
        count = _num_skips_for(task, learned.cost, base)
        for name, order in orders.items():
            add(name, budget, path_outcome(task, sequences, _static_choice(frozenset(order(count)), base))[0])
    return rows


SkipOrder = Callable[[int], Sequence[int]]
"""The layers to skip, given how many."""


def greedy_skip_order(task: Task, sequences: Sequence[Sequence[int]], base: Action) -> SkipOrder:
    """Adds, one after another, the layer whose skipping raises the divergence least (the ShortGPT kind)."""
    order: list[int] = []
    full = full_path(task.decoder, sequences)

    def divergence(layer: int) -> float:
        choose = _static_choice(frozenset((*order, layer)), base)
        return path_outcome(task, sequences, choose, full)[0].divergence

    def first(count: int) -> list[int]:
        while len(order) < count:
            order.append(min((layer for layer in task.free_layers if layer not in order), key=divergence))
        return order[:count]

    return first


def _even_order(task: Task) -> SkipOrder:
    free = task.free_layers
    return lambda count: [free[int((place + 0.5) * len(free) / count)] for place in range(count)]


def _num_skips_for(task: Task, cost: float, base: Action) -> int:
    """How many skipped layers, with `base` in the others, come nearest to `cost`."""
    layer, free = task.costs.layer, len(task.free_layers)
    pinned = task.decoder.num_layers - free
    unskipped = pinned * layer[Action.FULL] + free * layer[base] + task.costs.head[task.head] + task.costs.fixed
    count = round((unskipped - cost) / (layer[base] - layer[Action.SKIP]))
    return max(0, min(count, free))


def _static_choice(skipped: frozenset[int], base: Action) -> Choose:
    def choose(layer: int, hidden: Tensor, last_actions: Tensor, spent: Tensor) -> Tensor:
        return torch.full((len(hidden),), int(Action.SKIP if layer in skipped else base))

    return choose


def _random_choice(actions: Tensor) -> Choose:
    generator = torch.Generator().manual_seed(0)
    shares = torch.stack([(actions == int(action)).float().mean(dim=1) for action in Action], dim=1)

    def choose(layer: int, hidden: Tensor, last_actions: Tensor, spent: Tensor) -> Tensor:
        return 1 + torch.multinomial(shares[layer], len(hidden), replacement=True, generator=generator)

    return choose
