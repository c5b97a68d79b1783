"""Lanes read a CUDA device's decision only once it is there, and work on the right device."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from dash_runtime.actions import Action
from dash_runtime.config import LaneKind
from dash_runtime.devices import CpuDevice, CudaDevice
from dash_runtime.engine.lanes import CudaStreamLane, InlineLane, Lane, make_lane
from dash_runtime.layers.compensation import Identity
from dash_runtime.policy.policy import Decision, Pending, State
from tests.runtime.support import CPU

GPU = torch.device("cuda", 1)


class FakeCuda:
    """A fake `torch.cuda` that keeps a journal of recorded events and of waits."""

    def __init__(self) -> None:
        self.journal: list[str] = []

    class _Event:
        def __init__(self, cuda: "FakeCuda") -> None:
            self._cuda = cuda

        def record(self, stream: Any) -> None:
            self._cuda.journal.append(f"record on {stream}")

        def synchronize(self) -> None:
            self._cuda.journal.append("host waits")

    class _Stream:
        def __init__(self, cuda: "FakeCuda", device: torch.device) -> None:
            self._cuda = cuda
            self._device = device

        def __str__(self) -> str:
            return f"the lane's stream of {self._device}"

        def wait_event(self, event: Any) -> None:
            self._cuda.journal.append(f"{self} waits")

        def synchronize(self) -> None:
            self._cuda.journal.append(f"{self} is drained")

    def Event(self, enable_timing: bool = False) -> Any:  # noqa: N802
        return self._Event(self)

    def Stream(self, device: torch.device, priority: int = 0) -> Any:  # noqa: N802
        return self._Stream(self, device)

    def current_stream(self, device: torch.device) -> str:
        return f"the current stream of {device}"

    def stream(self, stream: Any) -> Any:
        return nullcontext()


class FakeHidden:
    """A fake tensor on a device, which notes the streams that its memory is kept for."""

    def __init__(self, device: torch.device, cuda: FakeCuda) -> None:
        self.device = device
        self._cuda = cuda

    def record_stream(self, stream: Any) -> None:
        self._cuda.journal.append(f"memory kept for {stream}")


class JournalPolicy:
    """Notes when its work is queued and when its decision is read."""

    name = "journal"
    lookahead = 1
    pinned = frozenset((0,))
    block_size = 1
    head = Action.FULL
    compensation = Identity()

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda
        self._journal = cuda.journal

    def start(self, layer: int, state: State) -> Pending:
        self._journal.append("start")

        def read() -> Decision:
            self._journal.append("read")
            return Decision(((Action.SKIP,),))

        return read


def decide(lane: Lane, policy: JournalPolicy, device: torch.device = GPU) -> None:
    """Makes one decision from a state on that device."""
    try:
        state = State([], FakeHidden(device, policy.cuda), 0, (), [])  # type: ignore[arg-type]
        assert lane.result(lane.submit(policy, 1, state)).plan == ((Action.SKIP,),)
    finally:
        lane.close()


def test_a_decision_of_a_cuda_device_is_read_after_the_host_has_waited_for_it() -> None:
    cuda = FakeCuda()
    decide(InlineLane(CudaDevice(GPU, cuda)), JournalPolicy(cuda))
    assert cuda.journal == ["start", "record on the current stream of cuda:1", "host waits", "read"]


def test_a_decision_of_a_cpu_is_read_at_once() -> None:
    cuda = FakeCuda()
    decide(InlineLane(CpuDevice(CPU)), JournalPolicy(cuda), CPU)
    assert cuda.journal == ["start", "read"]


@pytest.mark.parametrize("kind", [None, LaneKind.CUDA_STREAM])
def test_a_stream_lane_waits_for_the_state_on_its_own_stream_and_the_host_for_the_answer_only(
    kind: LaneKind | None,
) -> None:
    cuda = FakeCuda()
    lane = make_lane(kind, CudaDevice(GPU, cuda))
    assert isinstance(lane, CudaStreamLane)
    ticket = lane.submit(JournalPolicy(cuda), 1, State([], FakeHidden(GPU, cuda), 0, (), []))  # type: ignore[arg-type]
    assert "host waits" not in cuda.journal
    lane.result(ticket)
    lane.close()
    assert cuda.journal == [
        "record on the current stream of cuda:1",
        "the lane's stream of cuda:1 waits",
        "record on the lane's stream of cuda:1",
        "memory kept for the lane's stream of cuda:1",
        "start",
        "record on the lane's stream of cuda:1",
        "host waits",
        "read",
        "the lane's stream of cuda:1 is drained",
    ]


def test_with_several_devices_a_policy_runs_on_that_of_the_layer_that_it_observes() -> None:
    cuda = FakeCuda()
    others = [torch.device("cuda", number) for number in range(2)]
    lane = make_lane(LaneKind.INLINE, *(CudaDevice(device, cuda) for device in others))
    for device in reversed(others):
        decide(lane, JournalPolicy(cuda), device)
    waits = [entry for entry in cuda.journal if entry.startswith("record")]
    assert waits == ["record on the current stream of cuda:1", "record on the current stream of cuda:0"]


def test_with_several_devices_each_has_a_stream_of_its_own() -> None:
    cuda = FakeCuda()
    others = [torch.device("cuda", number) for number in range(2)]
    lane = make_lane(None, *(CudaDevice(device, cuda) for device in others))
    for device in others:
        state = State([], FakeHidden(device, cuda), 0, (), [])  # type: ignore[arg-type]
        lane.result(lane.submit(JournalPolicy(cuda), 1, state))
        assert f"record on the lane's stream of {device}" in cuda.journal
    assert lane.exposed_ns > 0
