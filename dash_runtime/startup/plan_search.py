"""Searches fixed plans: one action for each layer, edges included, and a head, the same for every token.

It starts at the cheapest plan with one action everywhere that is nearly lossless, measures what each cheaper action in
a single layer does to the divergence, and walks down in cost by the least damage for each saving. What several changes
of precision do together is nearly the sum, so they are taken several at a time; skips do more than their sum, so the
best few are measured together with all that was skipped before, one at a time. Every plan on the way is measured.
Knows the decoder and costs; knows no policies and no files.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from dash_runtime.actions import Action, CostTable
from dash_runtime.decoder.full_path import full_path, parts_of
from dash_runtime.errors import ConfigError
from dash_runtime.model_config import ModelConfig
from dash_runtime.policy.fixed_plans import MeasuredPlan, named, not_dominated
from dash_runtime.policy.policy import Actions, cheapest_kernel, fixed_head
from dash_runtime.rollout.rollout import divergences
from dash_runtime.rollout.task import Task

MAX_PLANS = 12
"""Plans that a search returns unless told otherwise, beside those with one kernel everywhere."""
NEARLY_LOSSLESS = 0.01
"""Divergence in nats per token of a plan to start from."""
_MAX_DIVERGENCE = 1.0
"""Where the walk ends: text beyond it is of no use."""
_NUM_TRIED = 3
"""Skips that are tried before one is taken."""
_STEPS_OF_PRECISION = 8
"""Steps in which all layers would change their precision."""
_SEARCH_WORK = 7e10
"""Tokens of a search's text times the model's parameters. A search runs them some hundred times."""
_LEAST_TOKENS = 64

_Move = tuple[int, Action]
"""A layer and its next action."""


@dataclass(frozen=True, slots=True)
class _Walked:
    """A plan with its path over the search's text."""

    plan: MeasuredPlan
    states: Sequence[Tensor]


class _Text:
    """One text, on which paths are judged against full depth."""

    def __init__(self, task: Task, sequences: Sequence[Sequence[int]]) -> None:
        self._task = task
        self._sequences = sequences
        self._rows = task.decided_rows(sequences)
        self.full = full_path(task.decoder, sequences)
        self.highest, self.finest_head = task.decoder.highest, task.decoder.finest_head

    def path(self, actions: Actions, known: Sequence[Tensor] = ()) -> list[Tensor]:
        """Returns the states of a plan. `known` are those up to the first layer in which it differs from another."""
        return self._task.fixed(actions, self._task.decoder.finest_head).roll_out(self._sequences, known=known).states

    def divergence(self, states: Sequence[Tensor], head: Action) -> float:
        """Returns the mean divergence of a path's tokens after the prompts."""
        full, ours = (path[-1][self._rows] for path in (self.full, states))
        return max(0.0, float(divergences(self._task.decoder, full, ours, head).divergence.mean()))


def search_text(model: ModelConfig, sequences: Sequence[Sequence[int]]) -> list[list[int]]:
    """Returns as much of the text as a search of this model's plans takes in a minute or two: less for a larger model.

    The sequences are of one length.
    """
    if not sequences:
        return []
    num_weights = sum(map(model.num_weights_read, range(model.num_layers))) + model.vocab_size * model.hidden_size
    num_tokens = max(_LEAST_TOKENS, int(_SEARCH_WORK / num_weights))
    return [list(ids[:num_tokens]) for ids in sequences[: max(1, num_tokens // len(sequences[0]))]]


def search_plans(
    task: Task,
    sequences: Sequence[Sequence[int]],
    heads: Iterable[Action] | None = None,
    actions: Collection[Action] | None = None,
    max_plans: int | None = MAX_PLANS,
) -> tuple[MeasuredPlan, ...]:
    """Returns the best plans along the range of costs, by ascending cost, with those of one kernel everywhere.

    Args:
        task: of its terms only the costs count.
        sequences: the tokens after the prompts are judged.
        heads: precisions of the head to choose from; None for all that the device has.
        actions: actions to choose from, FULL among them; None for all that the device has.
        max_plans: plans to return at most, beside those of one kernel everywhere; None for all on the way.

    Raises:
        ConfigError: no token of the text comes after a prompt.
    """
    if not task.decided_rows(sequences).any():
        raise ConfigError("data", f"has no sequence longer than the prompts of {task.num_prompt_tokens} tokens")
    costs = task.spec.costs
    text = _Text(task, sequences)
    allowed = set(costs.layer) & set(task.decoder.actions if actions is None else actions)
    known_heads = [head for head in heads or task.decoder.heads if head in costs.head]
    uniform = _uniform_plans(text, task.decoder.num_layers, sorted(allowed - {Action.SKIP}), known_heads)
    lossless = [walked for walked in uniform if walked.plan.divergence <= NEARLY_LOSSLESS]
    base = min(lossless or uniform, key=lambda walked: walked.plan.cost(costs))
    walk = [walked.plan for walked in uniform]
    for walked in _Walk(text, base, costs, allowed).plans():
        walk.append(walked.plan)
        if Action.SKIP in known_heads and walked.plan.head is not Action.SKIP:
            narrow = replace(walked.plan, head=Action.SKIP)
            walk.append(replace(narrow, divergence=text.divergence(walked.states, narrow.head)))
    usual = {(action, fixed_head(action, known_heads)) for action in allowed} | {
        (cheapest_kernel(allowed), Action.SKIP)
    }
    always = [plan for plan in walk[: len(uniform)] if (plan.actions[0], plan.head) in usual]
    best = [plan for plan in not_dominated(walk, costs) if plan not in always]
    if max_plans is not None:
        best = _spread(best, costs, max_plans)
    return named(sorted([*always, *best], key=lambda plan: plan.cost(costs)), costs)


def measure_plans(
    task: Task, sequences: Sequence[Sequence[int]], plans: Sequence[MeasuredPlan]
) -> tuple[MeasuredPlan, ...]:
    """Returns the plans with their divergences on another text."""
    totals = dict.fromkeys((plan.name for plan in plans), 0.0)
    count = 0
    for together in parts_of(sequences):
        text, num_rows = _Text(task, together), int(task.decided_rows(together).sum())
        count += num_rows
        for plan in plans:
            totals[plan.name] += text.divergence(text.path(plan.actions), plan.head) * num_rows
    return tuple(replace(plan, divergence=totals[plan.name] / count) for plan in plans)


def _uniform_plans(text: _Text, num_layers: int, kernels: Iterable[Action], heads: Sequence[Action]) -> list[_Walked]:
    """Returns the plans with one kernel in all layers, with each head; full depth has no divergence by definition."""
    walked: list[_Walked] = []
    for action in kernels:
        actions = (action,) * num_layers
        is_highest = action is text.highest
        states = text.full if is_highest else text.path(actions)
        for head in {*heads, text.finest_head} if is_highest else heads:
            is_full_depth = is_highest and head is text.finest_head
            divergence = 0.0 if is_full_depth else text.divergence(states, head)
            walked.append(_Walked(MeasuredPlan("", actions, head, divergence), states))
    return walked


class _Walk:
    """The way down in cost from a plan with one action everywhere.

    `_damage` is what each action of each layer adds to the divergence of `base`, as last measured.
    """

    def __init__(self, text: _Text, base: _Walked, costs: CostTable, allowed: Collection[Action]) -> None:
        self._text = text
        self._costs = costs
        self._current = base
        action = base.plan.actions[0]
        self._damage = {(layer, action): 0.0 for layer in range(costs.num_layers)}
        cheaper = [other for other in allowed if costs.layer[other] < costs.layer[action]]
        self._moves = [(layer, other) for layer in range(costs.num_layers) for other in cheaper]
        for move in self._moves:
            self._damage[move] = self._moved(dict([move])).plan.divergence - base.plan.divergence

    def plans(self) -> Iterator[_Walked]:
        """Yields each plan on the way, to the first one that diverges too far."""
        while self._current.plan.divergence <= _MAX_DIVERGENCE:
            layer_costs, now = self._costs.layer, self._current.plan.actions
            left = [(layer, other) for layer, other in self._moves if layer_costs[other] < layer_costs[now[layer]]]
            if not left:
                return
            left.sort(key=self._price)
            is_skip = left[0][1] is Action.SKIP
            self._current = self._after_a_skip(left) if is_skip else self._after_some_precision(left)
            yield self._current

    def _price(self, move: _Move) -> float:
        """Returns the damage of a move for what it saves."""
        layer, other = move
        now = self._current.plan.actions[layer]
        saved = self._costs.layer[now] - self._costs.layer[other]
        return (self._damage[move] - self._damage[layer, now]) / saved

    def _after_a_skip(self, moves: Sequence[_Move]) -> _Walked:
        """Tries the first few skips together with all that was changed before, and takes the best."""
        current = self._current.plan
        tried = [move for move in moves if move[1] is Action.SKIP][:_NUM_TRIED]
        reached = {move: self._moved(dict([move])) for move in tried}
        for (layer, skip), own in reached.items():
            before = self._damage[layer, current.actions[layer]]
            self._damage[layer, skip] = before + own.plan.divergence - current.divergence
        return reached[min(tried, key=self._price)]

    def _after_some_precision(self, moves: Sequence[_Move]) -> _Walked:
        """Takes the first moves that skip nothing, as many as a step may have."""
        changes: dict[int, Action] = {}
        for layer, other in moves:
            if other is Action.SKIP or len(changes) >= max(1, self._costs.num_layers // _STEPS_OF_PRECISION):
                break
            changes.setdefault(layer, other)
        return self._moved(changes)

    def _moved(self, changes: dict[int, Action]) -> _Walked:
        plan, states = self._current.plan, self._current.states
        actions = tuple(changes.get(layer, action) for layer, action in enumerate(plan.actions))
        path = self._text.path(actions, states[: min(changes) + 1])
        return _Walked(replace(plan, actions=actions, divergence=self._text.divergence(path, plan.head)), path)


def _spread(plans: Sequence[MeasuredPlan], costs: CostTable, count: int) -> list[MeasuredPlan]:
    """Returns at most `count` plans, evenly along the range of costs; they ascend in cost."""
    if len(plans) <= count:
        return list(plans)
    low, high = plans[0].cost(costs), plans[-1].cost(costs)
    targets = [low + (high - low) * step / (count - 1) for step in range(count)]
    near = {min(range(len(plans)), key=lambda place: abs(plans[place].cost(costs) - target)) for target in targets}
    return [plans[place] for place in sorted(near)]
