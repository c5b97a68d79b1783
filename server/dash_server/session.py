"""Serves one session: many generations on one stream, whose events of one moment leave in one message.

A message takes both sides about as long as all else that a token needs there, whatever is in it. Knows no servicer.
"""

import asyncio
import functools
import math
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.protobuf.wrappers_pb2 import UInt64Value

from dash_api.v1 import generation_pb2
from dash_runtime.errors import InvalidRequest
from dash_server import wire
from dash_server.auth import Caller
from dash_server.generation import MAX_TOKENS_PER_MESSAGE, Generation
from dash_server.logs import request_id_of_task
from dash_server.reading import has_grammar, prepare
from dash_server.request_record import CONTEXT_KEYS, at_end_of_call
from dash_server.service_state import (
    ServiceState,
    Work,
    given,
    logged_failure,
    open_generations,
    together,
    work_of,
)
from dash_server.statuses import SessionClosing, below
from dash_server.to_pb import Event, write_event

_MAX_WAITING_EVENTS = 1024
"""Events on their way out from which on no more requests are read."""
_MAX_MESSAGE_BYTES = 1 << 20


class Session:
    """One call of Session, whose full name is `method`."""

    def __init__(self, state: ServiceState, context: grpc.aio.ServicerContext, method: str) -> None:
        self._state = state
        self._context = context
        self._method = method
        self._running: dict[int, asyncio.Task[None]] = {}
        self._is_old = False
        self._outgoing = _Outgoing()

    async def run(self) -> None:
        """Serves generations until the caller closes its side, or the server shuts down, and all are over.

        Raises:
            InvalidRequest: a message belongs to no generation that could be told so.
            Unauthenticated: the caller is unknown.
            QueueFull, CallerLimitReached: there are too many sessions.
        """
        caller = self._state.caller(self._context)
        with self._state.sessions.admit(replace(caller, limits=self._state.session_limits)):
            await self._serve(caller)

    async def _serve(self, caller: Caller) -> None:
        reading, closing = asyncio.create_task(self._read(caller)), asyncio.create_task(self._close())
        for task in (reading, closing):
            task.add_done_callback(lambda _: self._outgoing.wake())
        with at_end_of_call(self._context, functools.partial(self._end, reading, closing)):
            while self._running or self._outgoing.message.events or not (reading.done() or closing.done()):
                for message in _parts(await self._outgoing.take()):
                    await self._context.write(message)
                if reading.done():
                    reading.result()

    async def _read(self, caller: Caller) -> None:
        """Begins and cancels generations as the caller says."""
        while (data := await self._context.read()) is not grpc.aio.EOF:
            await self._outgoing.have_room()
            number, request = await self._state.read(caller, work_of(len(data)), functools.partial(_numbered, data))
            if isinstance(request, generation_pb2.SessionRequest) and request.HasField("cancel"):
                if (task := self._running.get(number)) is not None:
                    task.cancel()
                continue
            if number in self._running:
                raise InvalidRequest("number", f"{number} belongs to a generation that is not over")
            self._running[number] = task = asyncio.create_task(self._generate(number, request))
            task.add_done_callback(functools.partial(self._over, number))

    async def _close(self) -> None:
        """Waits until no more generations may begin here: the server shuts down, or the connection is old."""
        try:
            async with asyncio.timeout(self._state.settings.max_connection_age_seconds):
                await self._state.admission.wait_draining()
        except TimeoutError:
            self._is_old = True

    def _end(self, *tasks: asyncio.Task[None]) -> None:
        for task in (*tasks, *self._running.values()):
            task.cancel()

    def _over(self, number: int, task: asyncio.Task[None]) -> None:
        del self._running[number]
        if task.cancelled():
            self._fail(number, grpc.StatusCode.CANCELLED, "the caller cancelled the generation")
        self._outgoing.wake()

    async def _generate(self, number: int, request: generation_pb2.SessionRequest | InvalidRequest) -> None:
        """Runs one generation to its end, and sends its events or its error."""
        request_id = uuid.uuid4().hex
        request_id_of_task.set(request_id)
        try:
            if isinstance(request, InvalidRequest):
                raise request
            if self._is_old:
                raise SessionClosing
            call = _CallOfSession(self._context, request)
            async with asyncio.timeout(call.time_remaining()):
                await self._answer(number, request_id, call, request.generate)
        except TimeoutError:
            self._fail(number, grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline has passed")
        except Exception as error:
            failure = logged_failure(error, request_id)
            self._fail(number, failure.code, failure.message, failure.details)

    def _fail(self, number: int, code: grpc.StatusCode, message: str, details: bytes = b"") -> None:
        """Sends the error with which a generation ends."""
        error = self._outgoing.add(number).error
        error.code, error.message, error.details = code.value[0], message, details

    async def _answer(
        self, number: int, request_id: str, call: "_CallOfSession", request: generation_pb2.StreamGenerateRequest
    ) -> None:
        work = Work.GRAMMAR if has_grammar(request) else work_of(request.ByteSize())
        opened = open_generations(
            self._state,
            call,
            request_id,
            self._method,
            given(work, functools.partial(prepare, request)),
        )
        async with opened as generations:
            with below("parameters"):
                answers = [
                    _Answer(generation, number, index, self._outgoing) for index, generation in enumerate(generations)
                ]
                await together([answer.run() for answer in answers])


class _Answer:
    """One answer of a generation. Writes its output into the next message as soon as a worker brings it: to wake a task
    for that would take a fifth of the time that a token takes the server."""

    def __init__(self, generation: Generation, number: int, index: int, outgoing: "_Outgoing") -> None:
        self._generation = generation
        self._number = number
        self._index = index
        self._outgoing = outgoing
        self._turn = -1
        """That of the message with its latest output."""
        self._over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def run(self) -> None:
        """Writes all events. Raises what ends the generation."""
        self._write(await self._generation.start())
        self._generation.listen(self._go_on)
        try:
            self._go_on()
            await self._over
        finally:
            self._generation.listen(None)
        self._write(self._generation.finish())

    def _go_on(self) -> None:
        """Writes what there is, unless the output before has not left yet: for a slow caller it grows instead."""
        if self._over.done():
            return
        if self._turn == self._outgoing.turn:
            self._outgoing.when_taken[self] = self._go_on
            return
        try:
            piece = self._generation.poll()
        except Exception as error:
            self._over.set_exception(error)
            return
        if piece is not None:
            self._turn = self._outgoing.turn
            self._write(piece)
            if len(piece.output.token_ids) == MAX_TOKENS_PER_MESSAGE:
                self._outgoing.when_taken[self] = self._go_on
        if self._generation.is_over:
            self._over.set_result(None)

    def _write(self, event: Event) -> None:
        write_event(event, self._index, self._outgoing.add(self._number).response)


class _Outgoing:
    """Events that wait for the next message."""

    def __init__(self) -> None:
        self.message = generation_pb2.SessionResponse()
        """The next one, as far as it goes."""
        self.turn = 0
        """Its number."""
        self.when_taken: dict[object, Callable[[], None]] = {}
        """Calls to make, once, when it has been taken."""
        self._change = asyncio.Event()

    def add(self, number: int) -> generation_pb2.SessionEvent:
        """Returns a new event of the next message. It has to be written at once."""
        self._change.set()
        return self.message.events.add(number=number)

    async def have_room(self) -> None:
        """Waits until not too many events wait."""
        while len(self.message.events) >= _MAX_WAITING_EVENTS:
            taken = asyncio.Event()
            self.when_taken[taken] = taken.set
            await taken.wait()

    def wake(self) -> None:
        """Lets `take` return, even with nothing."""
        self._change.set()

    async def take(self) -> generation_pb2.SessionResponse:
        """Waits for a change, and takes the message."""
        await self._change.wait()
        self._change.clear()
        message, self.message = self.message, generation_pb2.SessionResponse()
        self.turn += 1
        when_taken, self.when_taken = self.when_taken, {}
        for call in when_taken.values():
            call()
        return message


class _CallOfSession:
    """One generation of a session, as others see a call: with a deadline and a caller's span of its own."""

    def __init__(self, context: grpc.aio.ServicerContext, request: generation_pb2.SessionRequest) -> None:
        """Begins the time until the deadline.

        Raises:
            InvalidRequest: the timeout is not a positive number.
        """
        self._context = context
        self._ends_at = math.inf
        if request.HasField("timeout_seconds"):
            if not request.timeout_seconds > 0:
                raise InvalidRequest("timeout_seconds", "must be a number above 0")
            self._ends_at = time.monotonic() + request.timeout_seconds
        self._trace = {key: getattr(request, key) for key in CONTEXT_KEYS if request.HasField(key)}

    def time_remaining(self) -> float | None:
        of_session = self._context.time_remaining()
        seconds = min(self._ends_at - time.monotonic(), math.inf if of_session is None else of_session)
        return None if seconds == math.inf else seconds

    def invocation_metadata(self) -> Sequence[tuple[str, str | bytes]]:
        pairs = tuple(self._context.invocation_metadata() or ())
        if not self._trace:
            return pairs
        return (*(pair for pair in pairs if pair[0] not in CONTEXT_KEYS), *self._trace.items())

    def auth_context(self) -> Mapping[str, Sequence[bytes]]:
        return self._context.auth_context()

    def peer(self) -> str:
        return self._context.peer()

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        """Does nothing: it is for handlers that gRPC does not resume, and a session's tasks are always resumed."""


def _numbered(data: bytes) -> tuple[int, generation_pb2.SessionRequest | InvalidRequest]:
    """Returns the number in a SessionRequest, and the rest or what is wrong with it. Raises as `_number` does."""
    return _number(data), _readable(data)


def _number(data: bytes) -> int:
    """Returns the number in a SessionRequest of which nothing else may be readable.

    Raises:
        InvalidRequest: the bytes are no message.
    """
    try:
        return UInt64Value.FromString(data).value  # which has the same field
    except DecodeError:
        raise InvalidRequest("request", "the bytes are not a dash_api.v1.SessionRequest") from None


def _readable(data: bytes) -> generation_pb2.SessionRequest | InvalidRequest:
    """Returns the request in `data`, or what is wrong with it."""
    try:
        request = wire.parse(generation_pb2.SessionRequest, data)
    except InvalidRequest as error:
        return InvalidRequest(error.field.removeprefix("generate."), error.description)
    if request.WhichOneof("action") is None:
        return InvalidRequest("action", "is required: generate or cancel")
    return request


def _parts(message: generation_pb2.SessionResponse) -> Iterator[generation_pb2.SessionResponse]:
    """Splits a message into those that are not too long for the usual limits of clients. An empty one is none."""
    if message.ByteSize() <= _MAX_MESSAGE_BYTES:
        if message.events:
            yield message
        return
    part, num_bytes = generation_pb2.SessionResponse(), 0
    for event in message.events:
        num_bytes += event.ByteSize()
        if part.events and num_bytes > _MAX_MESSAGE_BYTES:
            yield part
            part, num_bytes = generation_pb2.SessionResponse(), event.ByteSize()
        part.events.append(event)
    yield part
