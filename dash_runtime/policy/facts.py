"""What a network is told beside the hidden state, written into memory that tensors share.

A row has the last action, one-hot over `num_known`; cost spent, log λ and its square; and λ times each action's cost.
With cold caches, writing numbers takes a fifth of the time of making a tensor. Knows tokens and actions; knows
no networks.
"""

import math
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.policy.network import NUM_SCALAR_FACTS
from dash_runtime.policy.policy import State, Token

Numbers: TypeAlias = "memoryview[float]"
"""Float32 numbers in memory that a tensor shares."""


class RowFacts:
    """One row's facts, in `numbers` from the start on."""

    def __init__(self, numbers: Numbers, num_known: int, action_costs: Sequence[float]) -> None:
        self._numbers = numbers
        self._num_known = num_known
        self._action_costs = action_costs
        self._last = 0
        self._price = 0.0

    def begin(self, token: Token) -> None:
        """Writes what holds for all layers of a token."""
        if token.price == self._price:
            return
        self._price = token.price
        log_price = math.log(token.price)
        self._numbers[self._num_known + 1] = log_price
        self._numbers[self._num_known + 2] = log_price * log_price
        for place, cost in enumerate(self._action_costs, self._num_known + NUM_SCALAR_FACTS):
            self._numbers[place] = token.price * cost

    def update(self, action: Action, cost_spent: float) -> None:
        """Writes the last action, and the share of cost spent up to it."""
        numbers = self._numbers
        numbers[self._last] = 0.0
        self._last = action - 1
        numbers[self._last] = 1.0
        numbers[self._num_known] = cost_spent


class Facts:
    """The facts of several rows, as tensors `[rows, num_known + 3 + num_actions]`."""

    def __init__(self, num_known: int, action_costs: Sequence[float]) -> None:
        self._num_known = num_known
        self._action_costs = action_costs
        self._kept: dict[int, tuple[list[RowFacts], Tensor]] = {}

    def in_place(self, state: State) -> Tensor:
        """Returns the tensor of the last call with as many rows. A program has read it once it returns."""
        num_rows = len(state.tokens)
        if num_rows not in self._kept:
            self._kept[num_rows] = self._make(num_rows)
        return _written(self._kept[num_rows], state)

    def apart(self, state: State) -> Tensor:
        """Returns a new tensor."""
        return _written(self._make(len(state.tokens)), state)

    def _make(self, num_rows: int) -> tuple[list[RowFacts], Tensor]:
        size = self._num_known + NUM_SCALAR_FACTS + len(self._action_costs)
        numbers, tensor = shared_floats(num_rows * size)
        parts = [numbers[row * size : (row + 1) * size] for row in range(num_rows)]
        rows = [RowFacts(part, self._num_known, self._action_costs) for part in parts]
        return rows, tensor.view(num_rows, size)


def _written(kept: tuple[list[RowFacts], Tensor], state: State) -> Tensor:
    rows, tensor = kept
    for row, token, action, cost_spent in zip(rows, state.tokens, state.actions, state.cost_spent, strict=True):
        row.begin(token)
        row.update(action, cost_spent)
    return tensor


def shared_floats(count: int) -> tuple[Numbers, Tensor]:
    """Returns float32 zeros, as numbers to write and read and as a tensor of the same memory."""
    memory = bytearray(4 * count)
    return memoryview(memory).cast("f"), torch.frombuffer(memory, dtype=torch.float32)
