"""Calls that are over, before the garbage collector looks: what they held is gone, or would lie about for minutes."""

import asyncio
import gc
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import grpc
import pytest

from dash_server.request_record import at_end_of_call
from dash_server.service_state import errors_to_status
from dash_server.statuses import QueueFull


class Call:
    """A call's context that refers to itself, its callbacks and its error for ever, as gRPC's does."""

    def __init__(self) -> None:
        self._callbacks: list[Callable[[], None]] = []
        self.error: BaseException | None = None

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        self._callbacks.append(partial(callback, self))

    async def abort(self, *_: object) -> None:
        self.error = grpc.aio.AbortError()
        raise self.error

    def end(self) -> None:
        for callback in self._callbacks:
            callback()


class Decisions:
    """Something large that a handler holds."""

    num_closed = 0

    def close(self) -> None:
        self.num_closed += 1


@pytest.fixture(autouse=True)
def without_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


def test_a_call_keeps_nothing_of_what_its_end_has_to_close() -> None:
    call, decisions = Call(), Decisions()
    with at_end_of_call(call, decisions.close):  # type: ignore[arg-type]
        pass
    call.end()
    assert decisions.num_closed == 1
    left = weakref.ref(decisions)
    del decisions
    assert left() is None


def test_what_a_call_holds_is_closed_at_its_end_if_its_handler_never_goes_on() -> None:
    call, decisions = Call(), Decisions()
    handler = at_end_of_call(call, decisions.close)  # type: ignore[arg-type]
    handler.__enter__()
    assert decisions.num_closed == 0
    call.end()
    assert decisions.num_closed == 1


def test_a_refused_call_keeps_nothing_of_its_handlers_variables() -> None:
    call, error, kept = Call(), QueueFull(1, 1.0), []

    def wait() -> None:
        decisions = Decisions()
        kept.append(weakref.ref(decisions))
        raise error

    async def handler() -> None:
        decisions = Decisions()
        kept.append(weakref.ref(decisions))
        async with errors_to_status(call):  # type: ignore[arg-type]
            wait()

    with pytest.raises(grpc.aio.AbortError):
        asyncio.run(handler())
    call.end()
    assert [left() for left in kept] == [None, None]
    assert call.error is not None
