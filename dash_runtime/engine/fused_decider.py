"""A decider whose policy is evaluated within the layers' programs: each one also decides the next layer.

Knows policies and rows; knows no programs. Nothing waits, so lanes have no part in it.
"""

from collections.abc import Sequence

import torch

from dash_runtime.actions import Action, CostTable
from dash_runtime.engine.lanes import Lane
from dash_runtime.engine.step import DecidedBlock, Decider
from dash_runtime.layers.evaluation import Evaluation
from dash_runtime.layers.pass_plan import PassPlan, PassRun
from dash_runtime.policy.learned import LearnedPolicy
from dash_runtime.policy.policy import Token


class FusedDecider(Decider):
    """For a policy with `layer_programs`. The arguments are those of `Decider`."""

    policy: LearnedPolicy

    def __init__(
        self, policy: LearnedPolicy, rows: Sequence[int], tokens: Sequence[Token], costs: CostTable, num_rows: int
    ) -> None:
        super().__init__(policy, rows, tokens, costs, num_rows)
        self._is_decided = [layer not in policy.pinned for layer in range(costs.num_layers)] + [False]
        self._evaluations = policy.row_evaluations(len(self.rows))
        self._placed = list(zip(self.rows, self._evaluations, strict=True))
        for evaluation, token in zip(self._evaluations, tokens, strict=True):
            evaluation.begin(token, costs)
        self._scores: list[tuple[int, list[bytes]]] = []

    @property
    def pass_plan(self) -> PassPlan | None:
        return PassPlan(self.policy.pinned, self._evaluations[0])

    def take(self, run: PassRun) -> None:
        self._scores = [(layer, [scores]) for layer, scores in run.scores.items()]

    def actions(self, layer: int, lane: Lane) -> Sequence[Action]:
        if not self._is_decided[layer]:
            return self._pinned[layer]
        self._scores.append((layer, [evaluation.scores() for evaluation in self._evaluations]))
        if len(self._evaluations) == 1:
            return self._evaluations[0].chosen()
        return [evaluation.chosen()[0] for evaluation in self._evaluations]

    def observe(
        self, layer: int, hidden: torch.Tensor, actions: Sequence[Action], lane: Lane
    ) -> Sequence[Evaluation | None]:
        for row, evaluation in self._placed:
            evaluation.observe(layer + 1, actions[row])
        return self._evaluations if self._is_decided[layer + 1] else self._nothing

    @property
    def num_evaluations(self) -> int:
        return len(self._scores)

    @property
    def blocks(self) -> Sequence[DecidedBlock]:
        return [DecidedBlock((layer,), None, scores) for layer, scores in self._scores]
