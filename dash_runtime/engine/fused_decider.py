"""A decider of a single row whose policy is evaluated within the pass, layer after layer, with nothing in between.

Knows policies and rows; knows no kernels. Nothing waits, so lanes have no part in it.
"""

from collections.abc import Sequence

import torch

from dash_runtime.actions import Action, CostTable
from dash_runtime.engine.lanes import Lane
from dash_runtime.engine.step import DecidedBlock, Decider
from dash_runtime.layers.pass_plan import PassPlan, PassRun
from dash_runtime.policy.learned import LearnedPolicy
from dash_runtime.policy.policy import Token


class FusedDecider(Decider):
    """For a policy that decides alone. The arguments are those of `Decider`, for one row."""

    policy: LearnedPolicy

    def __init__(
        self, policy: LearnedPolicy, rows: Sequence[int], tokens: Sequence[Token], costs: CostTable, num_rows: int
    ) -> None:
        super().__init__(policy, rows, tokens, costs, num_rows)
        (token,) = tokens
        self._plan = PassPlan(policy.pinned, policy.begin_row(token, costs))
        self._scores = b""

    @property
    def pass_plan(self) -> PassPlan | None:
        return self._plan

    def take(self, run: PassRun) -> None:
        self._scores = run.scores

    def actions(self, layer: int, lane: Lane) -> Sequence[Action]:
        raise AssertionError("the pass decides")

    def observe(self, layer: int, hidden: torch.Tensor, actions: Sequence[Action], lane: Lane) -> None:
        raise AssertionError("the pass decides")

    @property
    def num_evaluations(self) -> int:
        return self.policy.num_evaluations

    @property
    def blocks(self) -> Sequence[DecidedBlock]:
        size = 4 * len(self.policy.score_actions)
        decided = [layer for (layer,) in self.policy.spec.decision_blocks]
        return [DecidedBlock((layer,), None, [self._scores[layer * size : (layer + 1) * size]]) for layer in decided]
