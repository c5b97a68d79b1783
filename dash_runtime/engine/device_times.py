"""Replaces the host's times of a pass's decisions with a device's. Knows tickets and a timer; knows no sequences."""

from array import array
from collections.abc import Iterable, Sequence

from dash_runtime.devices.step_timer import CudaStepTimer
from dash_runtime.engine.decider import DecidedBlock
from dash_runtime.passes import OnePass, PassRecord


def settle_decisions(record: PassRecord, blocks: Iterable[DecidedBlock]) -> None:
    """Sets when the evaluations of a pass ran on their stream, and how long the decoder's stream stood still for each;
    does nothing where the host's times hold.

    That is its idle time before the first decided layer, less what it idles between layers that wait for no decision.
    To be called once the pass is done, and before the next one begins.
    """
    timer = record.timer if isinstance(record, OnePass) else None
    if not isinstance(timer, CudaStepTimer):
        return
    timed = [block for block in blocks if block.ticket.events is not None]
    if not timed:
        return
    idle = _idle_ns(timer.times())
    waiting = {block.layers[0] for block in timed}
    usual = min((gap for layer, gap in enumerate(idle) if layer and layer not in waiting), default=0)
    for block in timed:
        ticket = block.ticket
        assert ticket.events is not None
        ticket.started_ns, ticket.ended_ns = map(timer.time_of, ticket.events)
        ticket.exposed_ns = max(0, idle[block.layers[0]] - usual)


def _idle_ns(times: array) -> Sequence[int]:
    """Returns the time between each layer's beginning and the end of the layer before; 0 for the first."""
    return [0, *(begin - end for end, begin in zip(times[1::2], times[2::2], strict=False))]
