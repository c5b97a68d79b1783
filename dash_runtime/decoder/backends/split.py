"""Layers that lie on several devices: each device's own backend runs its stretch, and the hidden state moves between.

Knows backends and devices; knows no weights.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.decoder.backends.backend import Backend, Graphs
from dash_runtime.decoder.backends.loop import LayerLoop, LoopEnds
from dash_runtime.layers.batch import Batch


class SplitBackend(LayerLoop):
    """Runs each layer with the backend of its device.

    A layer's output is returned on the next layer's device, so that a policy sees that layer's input there. The last
    layer's stays where it is: its device has the heads.
    """

    def __init__(
        self, ends: LoopEnds, backends: Mapping[torch.device, Backend], devices: Sequence[torch.device]
    ) -> None:
        super().__init__(ends)
        self._backends = [backends[device] for device in devices]
        self._parts = list(backends.values())
        after = [*devices[1:], devices[-1]]
        self._moves_to = [None if next_one == own else next_one for own, next_one in zip(devices, after, strict=True)]
        self.logits = self._backends[-1].logits

    @property
    def graphs(self) -> Graphs | None:
        return None if self._backends[0].graphs is None else self

    def takes(self, batch: Batch) -> bool:
        return all(backend.takes(batch) for backend in self._backends)

    def static_input(self, layer: int, hidden: Tensor) -> Tensor | None:
        return self._graphs_of(self._backends[layer]).static_input(layer, hidden)

    def graph_sizes(self, max_rows: int) -> Sequence[int]:
        return self._graphs_of(self._backends[0]).graph_sizes(max_rows)

    def context_sizes(self, longest: int) -> Sequence[int]:
        return self._graphs_of(self._backends[0]).context_sizes(longest)

    def prepare(self, batch: Batch, layer: int, context: int) -> None:
        self._graphs_of(self._backends[layer]).prepare(batch, layer, context)

    @property
    def may_capture(self) -> bool:
        return self._graphs_of(self._backends[0]).may_capture

    @may_capture.setter
    def may_capture(self, may: bool) -> None:
        for backend in self._parts:
            self._graphs_of(backend).may_capture = may

    @staticmethod
    def _graphs_of(backend: Backend) -> Graphs:
        assert backend.graphs is not None
        return backend.graphs

    def run_layer(self, layer: int, actions: Sequence[Action], hidden: Tensor, batch: Batch) -> Tensor:
        output = self._backends[layer].run_layer(layer, actions, hidden, batch)
        device = self._moves_to[layer]
        return output if device is None else output.to(device)


def backend_over(ends: LoopEnds, backends: Mapping[torch.device, Backend], devices: Sequence[torch.device]) -> Backend:
    """Returns the backend of layers on these devices, one per layer. A single device's own needs nothing around it."""
    return SplitBackend(ends, backends, devices) if len(backends) > 1 else backends[devices[0]]
