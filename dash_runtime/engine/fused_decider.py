"""A decider whose policy a pass can evaluate, layer after layer, with nothing in between.

Knows policies and rows; knows no kernels. Nothing waits, so lanes have no part in it.
"""

from collections.abc import Sequence
from functools import cached_property

from dash_runtime.actions import CostTable
from dash_runtime.engine.step import Decider
from dash_runtime.layers.pass_plan import Decided
from dash_runtime.policy.learned import LearnedPolicy
from dash_runtime.policy.policy import Token


class FusedDecider(Decider):
    """For a policy that decides in the pass. If no pass can, it is asked as other deciders are."""

    policy: LearnedPolicy

    def __init__(
        self, policy: LearnedPolicy, rows: Sequence[int], tokens: Sequence[Token], costs: CostTable, num_rows: int
    ) -> None:
        self._told = [policy.new_row() for _ in rows]
        super().__init__(policy, rows, tokens, costs, num_rows)

    def begin(self, tokens: Sequence[Token]) -> None:
        super().begin(tokens)
        for (facts, _), token in zip(self._told, tokens, strict=True):
            facts.begin(token)

    @property
    def decided(self) -> Sequence[Decided]:
        return [(self.policy.pinned, decisions) for _, decisions in self._told]

    @cached_property
    def num_evaluations(self) -> int:
        return self.policy.num_evaluations

    def scores_in_pass(self, row: int) -> bytes | None:
        return None if self.blocks else self._told[self.rows.index(row)][1].scores
