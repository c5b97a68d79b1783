"""Evaluations of learned policies as CUDA graphs: one for each decision block and number of rows.

A graph takes the facts from the host's memory and leaves the result there. Has not been run on a GPU. Knows policies
and states; knows no streams and no sequences.
"""

import torch
from torch import Tensor

from dash_runtime.decoder.backends.backend import Graphs
from dash_runtime.devices import Device
from dash_runtime.devices.cuda_graphs import Capture, Replay
from dash_runtime.policy.learned import LearnedPolicy
from dash_runtime.policy.policy import Decision, Pending, Policy, State


class PolicyGraphs:
    """Makes the graphs when they are first needed, as far as that may be then.

    Args:
        graphs: those of the decoder, which say where states lie.
    """

    def __init__(self, device: Device, capture: Capture, graphs: Graphs) -> None:
        self._device = device
        self._capture = capture
        self._of_decoder = graphs
        self._graphs: dict[tuple[int, int, int], PolicyGraph] = {}

    def find(self, policy: Policy, layer: int, state: State) -> "PolicyGraph | None":
        """Returns the graph that decides the block which begins with `layer`.

        None if there is none yet and nothing may be captured; or if a graph cannot read this state: when several
        policies have rows, each one's are gathered.
        """
        if not isinstance(policy, LearnedPolicy):
            return None
        hidden = self._of_decoder.static_input(state.observed, state.hidden)
        if hidden is None:
            return None
        key = id(policy.network), layer, len(hidden)  # drafters are made anew, with other heads
        graph = self._graphs.get(key)
        if graph is None:
            if not self._of_decoder.may_capture:
                return None
            graph = self._graphs[key] = PolicyGraph(policy, layer, hidden, self._device, self._capture)
        return graph


class PolicyGraph:
    """One block's evaluation, for up to as many rows as `hidden` has."""

    def __init__(self, policy: LearnedPolicy, layer: int, hidden: Tensor, device: Device, capture: Capture) -> None:
        self._policy = policy  # kept, so that nothing else gets its network's id
        self._layer = layer
        num_facts, num_results = policy.num_facts, 1 + len(policy.score_actions)
        facts = torch.zeros(len(hidden), num_facts, device=hidden.device)
        self._facts = device.host_memory((len(hidden), num_facts), torch.float32)
        self._results = device.host_memory((len(hidden), policy.block_size, num_results), torch.float32)

        def evaluate() -> None:
            facts.copy_(self._facts, non_blocking=True)
            self._results.copy_(policy.evaluate(layer, hidden, facts), non_blocking=True)

        self._evaluate, self._capture = evaluate, capture
        self._replay: Replay | None = None

    def start(self, state: State) -> Pending:
        """Queues an evaluation on the current stream. The last one has to be done, and its result read.

        Raises:
            CaptureFailed: it is the first one, and the device cannot record it.
        """
        num_rows = len(state.tokens)
        self._facts[:num_rows].copy_(self._policy.facts_of(state))
        if self._replay is None:  # capturing reads the facts too
            self._replay = self._capture(self._evaluate)
        self._replay()

        def read() -> Decision:
            return self._policy.decision(self._layer, self._results[:num_rows].clone())

        return read
