"""A recorded step on CUDA has the device's times; a decision is exposed for as long as the decoder waited for it."""

from typing import Any

from dash_runtime.devices.step_timer import CudaStepTimer
from dash_runtime.engine.decider import DecidedBlock
from dash_runtime.engine.device_times import settle_decisions
from dash_runtime.engine.lanes import Ticket
from dash_runtime.passes import OnePass
from dash_runtime.policy.policy import Decision
from tests.runtime.support import CPU


class FakeClock:
    """Stands for `torch.cuda`; recording an event takes the next of some microseconds."""

    def __init__(self, microseconds: list[int]) -> None:
        self._microseconds = iter(microseconds)

    def Event(self, enable_timing: bool) -> Any:  # noqa: N802
        return FakeEvent(self)

    def current_stream(self, device: Any) -> "FakeClock":
        return self

    def now(self) -> int:
        return next(self._microseconds)


class FakeEvent:
    at = 0

    def __init__(self, clock: FakeClock) -> None:
        self._clock = clock

    def record(self, stream: Any) -> None:
        self.at = self._clock.now()

    def elapsed_time(self, later: "FakeEvent") -> float:
        return (later.at - self.at) / 1000


def test_a_decision_is_exposed_for_the_idle_time_before_its_layer_less_the_usual() -> None:
    # Layers of 40 µs. The device idles 2 µs before the second, 12 before the third, and 3 before the fourth.
    clock = FakeClock([100, *(100, 140), *(142, 182), *(194, 234), *(237, 277), *(150, 170)])
    timer = CudaStepTimer(8, CPU, clock)
    timer.start()
    for place in range(8):
        timer.mark(place)
    ticket = Ticket(lambda: Decision(()))
    ticket.events = clock.Event(True), clock.Event(True)
    for event in ticket.events:
        event.record(clock)
    settle_decisions(OnePass(timer, 0), [DecidedBlock((2,), ticket, None)])
    begin = timer.times()[0]
    assert [round((at - begin) / 1000) for at in timer.times()] == [0, 40, 42, 82, 94, 134, 137, 177]
    assert [round((at - begin) / 1000) for at in (ticket.started_ns, ticket.ended_ns)] == [50, 70]
    assert round(ticket.exposed_ns / 1000) == 10


def test_a_step_whose_pass_decides_keeps_the_hosts_times() -> None:
    timer = CudaStepTimer(2, CPU, FakeClock([]))
    settle_decisions(OnePass(timer, 0), [])
