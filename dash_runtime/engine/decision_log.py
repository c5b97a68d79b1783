"""What was done with the layers of one sequence's tokens, in memory that was allocated beforehand.

The hot path only appends. Knows actions and costs; knows no policy and no sink.
"""

from dash_runtime.actions import Action, CostTable


class DecisionLog:
    """One byte per layer and token of the output, and sums over what ran for the decode tokens, drafts included."""

    def __init__(self, num_layers: int, max_tokens: int, costs: CostTable) -> None:
        self._num_layers = num_layers
        self._plans = bytearray(max_tokens * num_layers)
        self._num_tokens = 0
        self._costs = costs
        self.num_decode_tokens = 0
        self.action_counts = dict.fromkeys(Action, 0)
        self.total_cost = 0.0
        self.exposed_ns = 0

    def append_prefill_token(self) -> bytes:
        """Records the first output token, which the prefill made at full depth; returns its plan."""
        return self._append(bytes((Action.FULL,)) * self._num_layers)

    def append_decode_token(self, plan: bytes, head: Action, exposed_ns: int) -> None:
        """Records a decode token: its plan, head precision, and what the decoder lost to the policy."""
        self._append(plan)
        self.num_decode_tokens += 1
        self.add_draft_token(plan, head, exposed_ns)

    def append_verified_token(self) -> bytes:
        """Records a decode token that a verification put out; returns its plan, full depth's."""
        self.num_decode_tokens += 1
        return self._append(bytes((Action.FULL,)) * self._num_layers)

    def add_verification(self, num_rows: int, cost: float) -> None:
        """Counts a full-depth pass over so many rows; `cost` is a share of one full-depth token."""
        self.action_counts[Action.FULL] += num_rows * self._num_layers
        self.total_cost += cost

    def add_draft_token(self, plan: bytes, head: Action, exposed_ns: int) -> float:
        """Counts what ran for a token that may not be put out; returns its cost."""
        self.exposed_ns += exposed_ns
        cost = self._costs.fixed + self._costs.head[head]
        for action in Action:
            if count := plan.count(action):
                self.action_counts[action] += count
                cost += count * self._costs.layer[action]
        self.total_cost += cost
        return cost

    @property
    def plans(self) -> memoryview:
        """All plans so far, `[tokens, layers]` flattened."""
        return memoryview(self._plans)[: self._num_tokens * self._num_layers]

    def layer_action_counts(self) -> list[list[int]]:
        """For each layer, how many decode tokens of the output ran each action there, by Action's order."""
        decoded = bytes(self.plans[self._num_layers :])
        layers = (decoded[layer :: self._num_layers] for layer in range(self._num_layers))
        return [[column.count(action) for action in Action] for column in layers]

    @property
    def mean_cost(self) -> float:
        """Share of a full-depth token, over the decode tokens, with all that was drafted and verified for them; 1 where
        there are none."""
        return self.total_cost / self.num_decode_tokens if self.num_decode_tokens else 1.0

    @property
    def mean_exposed_seconds(self) -> float:
        """Per decode token."""
        return self.exposed_ns / 1e9 / self.num_decode_tokens if self.num_decode_tokens else 0.0

    def _append(self, plan: bytes) -> bytes:
        start = self._num_tokens * self._num_layers
        self._plans[start : start + self._num_layers] = plan
        self._num_tokens += 1
        return plan
