"""A decider of a single row whose policy is evaluated within the pass, layer after layer, with nothing in between.

Knows policies and rows; knows no kernels. Nothing waits, so lanes have no part in it.
"""

from collections.abc import Sequence
from functools import cached_property

import torch

from dash_runtime.actions import Action
from dash_runtime.engine.lanes import Lane
from dash_runtime.engine.step import DecidedBlock, Decider
from dash_runtime.layers.pass_plan import PassPlan, PassRun
from dash_runtime.policy.learned import LearnedPolicy
from dash_runtime.policy.policy import Token


class FusedDecider(Decider):
    """For a policy that decides alone. The arguments are those of `Decider`, for one row."""

    policy: LearnedPolicy

    def begin(self, tokens: Sequence[Token]) -> None:
        (token,) = tokens
        self._policy_rows = self.policy.begin_row(token)
        self._scores = b""

    @cached_property
    def pass_plan(self) -> PassPlan | None:
        return PassPlan(self.policy.pinned, self._policy_rows)

    def take(self, run: PassRun) -> None:
        self._scores = run.scores

    def actions(self, layer: int, lane: Lane) -> Sequence[Action]:
        raise AssertionError("the pass decides")

    def observe(self, layer: int, hidden: torch.Tensor, actions: Sequence[Action], lane: Lane) -> None:
        raise AssertionError("the pass decides")

    @cached_property
    def num_evaluations(self) -> int:
        return self.policy.num_evaluations

    @property
    def blocks(self) -> Sequence[DecidedBlock]:
        size = 4 * len(self.policy.score_actions)
        decided = [layer for (layer,) in self.policy.spec.decision_blocks]
        return [DecidedBlock((layer,), None, [self._scores[layer * size : (layer + 1) * size]]) for layer in decided]
