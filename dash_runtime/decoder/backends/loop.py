"""The heart: takes the rows of a pass through the layers, each decided while an earlier one is running.

Knows a plan and layers; knows no policies, no lanes and no requests.
"""

import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.decoder.backends.backend import Graphs
from dash_runtime.devices import Device, device_of
from dash_runtime.layers.batch import Batch
from dash_runtime.layers.heads import Heads
from dash_runtime.passes import Limit, OnePass, PassPlan, PassRecord, PassResult


@dataclass(frozen=True, slots=True)
class LoopEnds:
    """The parts of a pass beside its layers."""

    num_layers: int
    embed: Callable[[Sequence[int]], Tensor]
    """Maps token ids to the input of layer 0, `[tokens, hidden_size]`."""
    heads: Heads
    """For rows that share no product."""
    clock: Device
    """It times layers; the CPU if these lie on several devices, whose events cannot be compared."""


class LayerLoop:
    """A backend that runs one layer at a time."""

    logits: Callable[[Tensor, Sequence[Action]], Tensor]

    def __init__(self, ends: LoopEnds) -> None:
        self._ends = ends

    @property
    def graphs(self) -> Graphs | None:
        return None

    def takes(self, batch: Batch) -> bool:
        return True

    @abstractmethod
    def run_layer(self, layer: int, actions: Sequence[Action], hidden: Tensor, batch: Batch) -> Tensor: ...

    def run(
        self, plan: PassPlan, token_ids: Sequence[int], batch: Batch, limit: Limit | None = None
    ) -> PassResult | None:
        return None if limit is not None else self.run_by_layer(plan, token_ids, batch)

    def run_by_layer(self, plan: PassPlan, token_ids: Sequence[int], batch: Batch) -> PassResult:
        """Runs a pass layer by layer."""
        started_ns, num_layers = time.perf_counter_ns(), self._ends.num_layers
        hidden = self.first_input(token_ids, batch)
        actions_by_layer: list[Sequence[Action]] = []
        timer = self._ends.clock.step_timer(2 * num_layers, batch.is_timed)
        for layer in range(num_layers):
            actions = plan.actions(layer, batch.num_rows)
            plan.observe(layer, hidden, actions)  # later layers are decided while this one runs
            timer.mark(2 * layer)
            hidden = self.run_layer(layer, actions, hidden, batch)
            timer.mark(2 * layer + 1)
            actions_by_layer.append(actions)
            if plan.on_layer is not None:
                plan.on_layer()
        plans = [bytes(own) for own in zip(*actions_by_layer, strict=True)]
        return self.ended(plan, hidden, plans, OnePass(timer, started_ns))

    def first_input(self, token_ids: Sequence[int], batch: Batch) -> Tensor:
        """Begins a pass over these tokens; returns layer 0's input, `[rows, hidden_size]`."""
        return self._ends.embed(token_ids)

    def ended(self, plan: PassPlan, hidden: Tensor, plans: list[bytes], record: PassRecord) -> PassResult:
        """Returns the result of a pass whose last layer put out `hidden`."""
        if not plan.heads:
            return PassResult([], plans, record, states=hidden)
        logits = (self.logits if plan.shares_head else self._ends.heads)(hidden, plan.heads)
        return PassResult(device_of(logits.device).likeliest(logits), plans, record, logits)
