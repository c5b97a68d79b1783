"""Lanes: where a policy is evaluated while the decoder runs.

Every lane has the same two calls; they differ in who waits. `exposed_ns` is the time that the decoder lost to the
policy: the whole evaluation inline, only the waiting elsewhere. On CUDA a policy only queues its work, and its decision
is read once that work is done. Knows policies and states; knows no sequences.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

from dash_runtime.config import LaneKind
from dash_runtime.decoder.backends.backend import Graphs
from dash_runtime.devices import CudaDevice, Device, device_of
from dash_runtime.engine.policy_graphs import PolicyGraphs
from dash_runtime.errors import ConfigError
from dash_runtime.policy.policy import Decision, Policy, State

_CPU = device_of(torch.device("cpu"))
_HIGHEST_PRIORITY = -1


class Ticket:
    """A pending decision, and the times of its evaluation by `perf_counter_ns`.

    With a CUDA stream they are the host's times, when it queued the work and when it had waited for it, until
    `device_times` replaces them.
    """

    __slots__ = ("ended_ns", "events", "exposed_ns", "started_ns", "wait")

    def __init__(self, wait: Callable[[], Decision], started_ns: int = 0, ended_ns: int = 0) -> None:
        self.wait = wait
        """Returns the decision. Raises what the policy raised."""
        self.started_ns = started_ns
        self.ended_ns = ended_ns
        self.exposed_ns = 0
        """Time that the decoder lost to this decision."""
        self.events: tuple[Any, Any] | None = None
        """CUDA's events of its beginning and end."""


class Lane(Protocol):
    """Evaluates policies, one after another."""

    @property
    def exposed_ns(self) -> int:
        """Time that the decoder has lost to policies so far."""

    def submit(self, policy: Policy, layer: int, state: State) -> Ticket: ...

    def result(self, ticket: Ticket) -> Decision: ...

    def close(self) -> None: ...


class InlineLane:
    """Evaluates in the caller's thread, at once."""

    def __init__(self, device: Device = _CPU) -> None:
        self.exposed_ns = 0
        self._device = device

    def submit(self, policy: Policy, layer: int, state: State) -> Ticket:
        started_ns = time.perf_counter_ns()
        decision = _decide(policy, layer, state, self._device)
        ticket = Ticket(lambda: decision, started_ns, time.perf_counter_ns())
        ticket.exposed_ns = ticket.ended_ns - started_ns
        self.exposed_ns += ticket.exposed_ns
        return ticket

    def result(self, ticket: Ticket) -> Decision:
        return ticket.wait()

    def close(self) -> None:
        pass


def _decide(policy: Policy, layer: int, state: State, device: Device) -> Decision:
    """Evaluates on the device's current stream, and reads the decision once it has arrived."""
    pending = policy.start(layer, state)
    device.wait_for_downloads()
    return pending()


class CudaStreamLane:
    """Evaluates on a CUDA stream of its own, started by the event of the work that made the state. Only the decoder's
    waiting is exposed.

    The chosen actions come back through pinned memory and an event, so the host waits for the small policy only, while
    a layer is still running. Its kernels go first where both streams have some to start.

    Args:
        graphs: the decoder's, which say where states lie.
    """

    def __init__(self, device: CudaDevice, graphs: Graphs | None = None) -> None:
        self.exposed_ns = 0
        self._device = device
        self._stream = device.cuda.Stream(device.device, priority=_HIGHEST_PRIORITY)
        self._events: dict[tuple[int, int], tuple[Any, Any, Any]] = {}
        self._graphs: PolicyGraphs | None = None
        if graphs is not None:
            self._graphs = PolicyGraphs(device, device.make_capture(self._stream), graphs)

    def submit(self, policy: Policy, layer: int, state: State) -> Ticket:
        started_ns = time.perf_counter_ns()
        cuda, key = self._device.cuda, (id(policy), layer)
        if key not in self._events:
            timed = [cuda.Event(enable_timing=True) for _ in range(2)]
            self._events[key] = cuda.Event(), timed[0], timed[1]
        made, begun, arrived = self._events[key]
        made.record(cuda.current_stream(self._device.device))
        with cuda.stream(self._stream):
            self._stream.wait_event(made)
            begun.record(self._stream)
            graph = None if self._graphs is None else self._graphs.find(policy, layer, state)
            if graph is None:
                self._device.keep_for(self._stream, state.hidden)
            pending = policy.start(layer, state) if graph is None else graph.start(state)
            arrived.record(self._stream)

        def wait() -> Decision:
            arrived.synchronize()
            return pending()

        ticket = Ticket(wait, started_ns)
        ticket.events = begun, arrived
        return ticket

    def result(self, ticket: Ticket) -> Decision:
        started_ns = time.perf_counter_ns()
        decision = ticket.wait()
        ended_ns = time.perf_counter_ns()
        ticket.ended_ns = ticket.ended_ns or ended_ns
        ticket.exposed_ns = ended_ns - started_ns
        self.exposed_ns += ticket.exposed_ns
        return decision

    def close(self) -> None:
        self._stream.synchronize()


class LanePerDevice:
    """Evaluates each policy on the device of the layer that it observes, in that device's own lane.

    Args:
        lanes: of one kind.
    """

    def __init__(self, lanes: Mapping[torch.device, Lane]) -> None:
        self._lanes = lanes
        self._any = next(iter(lanes.values()))

    @property
    def exposed_ns(self) -> int:
        return sum(lane.exposed_ns for lane in self._lanes.values())

    def submit(self, policy: Policy, layer: int, state: State) -> Ticket:
        return self._lanes[state.hidden.device].submit(policy, layer, state)

    def result(self, ticket: Ticket) -> Decision:
        return self._any.result(ticket)  # a ticket knows what to wait for, and the lost times are added up

    def close(self) -> None:
        for lane in self._lanes.values():
            lane.close()


def make_lane(kind: LaneKind | None, *devices: Device, graphs: Graphs | None = None) -> Lane:
    """Returns the lane of that kind, or the devices' default, for layers that lie on these devices.

    Raises:
        ConfigError: as `check_lane`.
    """
    check_lane(kind, *devices)
    if len(devices) > 1:
        return LanePerDevice({own.device: make_lane(kind, own, graphs=graphs) for own in devices})
    (device,) = devices
    if isinstance(device, CudaDevice) and (kind or device.default_lane) is LaneKind.CUDA_STREAM:
        return CudaStreamLane(device, graphs)
    return InlineLane(device)


def check_lane(kind: LaneKind | None, *devices: Device) -> None:
    """Raises ConfigError if a device cannot have such a lane."""
    for device in devices:
        if kind is not None and kind not in device.lanes:
            raise ConfigError("lane", f"{kind} needs a CUDA device, and this one is {device.device}")
