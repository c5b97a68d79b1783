"""Plays scripts for the generations of a session, each in a thread of its own."""

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grpc

from dash_api.v1 import generation_pb2


class GenerationAborted(Exception):
    """Ends one generation."""

    def __init__(self, error: generation_pb2.SessionError) -> None:
        super().__init__(error.message)
        self.error = error


class SessionEnded(Exception):
    """Ends the whole session."""


def end_session(_: Any) -> None:
    """A step of a script that ends the session in which it plays."""
    raise SessionEnded


class GenerationContext:
    """A generation's context in a session, which a script's steps see in place of a call's."""

    def __init__(self, session: grpc.ServicerContext, request: generation_pb2.SessionRequest) -> None:
        self._session = session
        self._trace = [("traceparent", request.traceparent)] if request.HasField("traceparent") else []
        self._details = b""
        self._at_end: list[Callable[[], None]] = []

    def invocation_metadata(self) -> list[tuple[str, str]]:
        return [*self._session.invocation_metadata(), *self._trace]

    def set_trailing_metadata(self, metadata: Any) -> None:
        self._details = dict(metadata).get("grpc-status-details-bin", b"")

    def abort(self, code: grpc.StatusCode, message: str) -> None:
        error = generation_pb2.SessionError(code=code.value[0], message=message, details=self._details)
        raise GenerationAborted(error)

    def add_callback(self, callback: Callable[[], None]) -> bool:
        self._at_end.append(callback)
        return True

    def end(self) -> None:
        for callback in self._at_end:
            callback()


class SessionPlay:
    """One session. `begin` returns the script of a generation; `cancelled` is set when one is cancelled or cut off."""

    def __init__(
        self,
        context: grpc.ServicerContext,
        begin: Callable[[generation_pb2.SessionRequest, GenerationContext], Sequence[Any]],
        cancelled: threading.Event,
    ) -> None:
        self._context = context
        self._begin = begin
        self._cancelled = cancelled
        self._events: queue.SimpleQueue[generation_pb2.SessionEvent | None] = queue.SimpleQueue()
        self._generations: dict[int, GenerationContext] = {}
        self._players: list[threading.Thread] = []

    def run(self, requests: Iterator[generation_pb2.SessionRequest]) -> Iterator[generation_pb2.SessionResponse]:
        self._context.add_callback(lambda: self._events.put(None))
        threading.Thread(target=self._read, args=(requests,), daemon=True).start()
        while (event := self._events.get()) is not None:
            yield generation_pb2.SessionResponse(events=[event])
        if any(player.is_alive() for player in self._players):
            self._cancelled.set()
        for generation in self._generations.values():
            generation.end()

    def _read(self, requests: Iterator[generation_pb2.SessionRequest]) -> None:
        with contextlib.suppress(Exception):  # gRPC's own, if the call is cut off
            for request in requests:
                if request.HasField("cancel"):
                    self._cancelled.set()
                    self._generations[request.number].end()
                    continue
                context = GenerationContext(self._context, request)
                self._generations[request.number] = context
                script = self._begin(request, context)
                player = threading.Thread(target=self._play, args=(request.number, script, context))
                player.start()
                self._players.append(player)
        for player in self._players:
            player.join()
        self._events.put(None)

    def _play(self, number: int, script: Sequence[Any], context: GenerationContext) -> None:
        try:
            for step in script:
                if callable(step):
                    step(context)
                else:
                    self._events.put(generation_pb2.SessionEvent(number=number, response=step))
        except SessionEnded:
            self._events.put(None)
        except GenerationAborted as aborted:
            self._events.put(generation_pb2.SessionEvent(number=number, error=aborted.error))
