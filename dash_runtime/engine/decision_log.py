"""Counts the actions and costs of one sequence's tokens, in memory that was allocated beforehand.

The hot path only appends. Knows actions and costs; knows no policy and no sink.
"""

from collections.abc import Mapping

from dash_runtime.actions import Action, CostTable
from dash_runtime.events import DepthStatistics


class DecisionLog:
    """One byte per layer and output token, and sums over all that ran for decode tokens, drafts included."""

    def __init__(self, num_layers: int, max_tokens: int, costs: CostTable) -> None:
        self._num_layers = num_layers
        self._plans = bytearray(max_tokens * num_layers)
        self._num_tokens = 0
        self._costs = costs
        self._full_depth = bytes((costs.highest,)) * num_layers
        self._num_decode_tokens = 0
        self._counts = dict.fromkeys(Action, 0)
        """Layers that ran each action, without the plans in `_uncounted`."""
        self._total_cost = 0.0
        self._exposed_ns = 0
        self._uncounted: dict[tuple[Action, int], list[bytes]] = {}
        """The plans of decode tokens that the sums are without, by head and number of evaluations."""

    def append_prefill_token(self, action: Action) -> bytes:
        """Records the first output token, which the prefill made with this action in all layers; returns its plan."""
        return self._append(bytes((action,)) * self._num_layers)

    def append_decode_token(self, plan: bytes, head: Action, num_evaluations: int, exposed_ns: int) -> None:
        """Records a decode token: its plan, the head's precision, the evaluations of a policy, and the time that the
        decoder lost to them."""
        self._append(plan)
        self._num_decode_tokens += 1
        self._exposed_ns += exposed_ns
        self._uncounted.setdefault((head, num_evaluations), []).append(plan)

    def append_counted_token(self, plan: bytes | None = None) -> bytes:
        """Records a decode token of a pass that was counted by itself; returns its plan, by default full depth's."""
        self._num_decode_tokens += 1
        return self._append(self._full_depth if plan is None else plan)

    def add_verification(self, num_rows: int, cost: float) -> None:
        """Counts a full-depth pass over `num_rows` rows; `cost` is in full-depth tokens."""
        self._add({self._costs.highest: num_rows * self._num_layers}, cost)

    def add_rows(self, plan: bytes, head: Action, num_rows: int, times_one: float) -> float:
        """Counts a pass whose rows all run this plan and which costs so many times what one row does; returns its
        cost."""
        cost = times_one * self.cost_of(plan, head, num_evaluations=0)
        self._add({action: count * num_rows for action, count in _counts(plan).items()}, cost)
        return cost

    def add_draft_token(self, plan: bytes, head: Action, num_evaluations: int, exposed_ns: int) -> float:
        """Counts what ran for a token that may never be output; returns its cost."""
        self._exposed_ns += exposed_ns
        cost = self.cost_of(plan, head, num_evaluations)
        self._add(_counts(plan), cost)
        return cost

    def cost_of(self, plan: bytes, head: Action, num_evaluations: int) -> float:
        """Returns the cost of a token, by the table that the sequence began with."""
        return self._costs.mean_cost(_counts(plan), head, num_evaluations)

    def add_guess(self, plan: bytes, cost: float) -> None:
        """Counts a second row of a drafting pass, which adds `cost`."""
        self._add(_counts(plan), cost)

    @property
    def plans(self) -> memoryview:
        """All plans so far, `[tokens, layers]` flattened."""
        return memoryview(self._plans)[: self._num_tokens * self._num_layers]

    def statistics(self) -> DepthStatistics:
        """Returns the sums so far."""
        for ends, plans in self._uncounted.items():
            counts, num_tokens = _counts(b"".join(plans)), len(plans)
            means = {action: count / num_tokens for action, count in counts.items()}
            self._add(counts, num_tokens * self._costs.mean_cost(means, *ends))
        self._uncounted.clear()
        decoded = bytes(self.plans[self._num_layers :])
        layers = (decoded[layer :: self._num_layers] for layer in range(self._num_layers))
        return DepthStatistics(
            self._num_decode_tokens,
            [[plans.count(action) for action in Action] for plans in layers],
            {action: count - decoded.count(action) for action, count in self._counts.items()},
            self._total_cost,
            self._exposed_ns,
        )

    def _add(self, counts: Mapping[Action, int], cost: float) -> None:
        for action, count in counts.items():
            self._counts[action] += count
        self._total_cost += cost

    def _append(self, plan: bytes) -> bytes:
        start = self._num_tokens * self._num_layers
        self._plans[start : start + self._num_layers] = plan
        self._num_tokens += 1
        return plan


def _counts(plan: bytes) -> dict[Action, int]:
    return {action: count for action in Action if (count := plan.count(action))}
