"""What the services share: their state, and the way of one generation call from its bytes to its end.

Knows no service's messages.
"""

import asyncio
import functools
import logging
import traceback
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from enum import Enum, auto
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message

from dash_server import wire
from dash_server.admission import Admission
from dash_server.audit import Auditor
from dash_server.auth import Authenticator, Caller, CallerLimits
from dash_server.dispatcher import Dispatcher
from dash_server.from_pb import PreparedRequest
from dash_server.generation import Generation
from dash_server.grammar_check import GrammarChecker
from dash_server.logs import request_id_of_task, trace_id_of_task
from dash_server.readers import Readers
from dash_server.reading import Reading
from dash_server.receiving import Receiver
from dash_server.recent_decisions import RecentDecisions
from dash_server.request_record import (
    Observer,
    RequestRecord,
    RunningCall,
    at_end_of_call,
    observed,
    record_of_call,
)
from dash_server.served_model import ServedModel
from dash_server.settings import Settings
from dash_server.statuses import Failure, WorkerUnavailable, failure_of

logger = logging.getLogger(__name__)

# Reading a longer request takes milliseconds, too long for the event loop; a shorter one costs less than a thread.
_MAX_INLINE_BYTES = 4096
_NUM_READER_THREADS = 2

T = TypeVar("T")
M = TypeVar("M", bound=Message)
Prepare = Callable[[Reading], PreparedRequest]


class Work(Enum):
    """The work of reading a request."""

    QUICK = auto()
    """Less than a thread would."""
    LONG = auto()
    """Milliseconds: too long for the event loop."""
    GRAMMAR = auto()
    """A check in another process, however short the request."""


Source = Callable[[Caller], Awaitable[tuple[Work, Prepare]]]
"""Receives a caller's request: what it takes to read it, and what does so."""


def given(work: Work, prepare: Prepare) -> Source:
    """Returns the source of a request that is here already."""

    async def receive(_: Caller) -> tuple[Work, Prepare]:
        return work, prepare

    return receive


def work_of(num_bytes: int) -> Work:
    """Returns what it takes to read so many bytes without a grammar."""
    return Work.LONG if num_bytes > _MAX_INLINE_BYTES else Work.QUICK


class ServiceState:
    """State that the servicers share. `model` is None until the first worker is ready."""

    def __init__(
        self, settings: Settings, admission: Admission, dispatcher: Dispatcher, authenticator: Authenticator
    ) -> None:
        self.settings = settings
        self.admission = admission
        self.dispatcher = dispatcher
        self.authenticator = authenticator
        self.recent_decisions = RecentDecisions(settings.recent_requests)
        self.auditor = Auditor(dispatcher, settings.audit_rate, settings.audit_warning_factor, settings.recent_requests)
        self.start_observers: list[Observer] = []
        """Called with each generation call that begins."""
        self.observers: list[Observer] = [self.auditor.keep]
        """Called with each generation call that is over."""
        self.model: ServedModel | None = None
        self.sessions = Admission(settings.max_sessions)
        self.session_limits = CallerLimits(max_requests=settings.max_sessions_per_caller)
        self.receiver = Receiver(settings.max_unfinished_messages, settings.message_timeout_seconds)
        self._readers = Readers(_NUM_READER_THREADS, "request-reader")
        # Of their own: a hostile grammar takes its reader a second.
        self._grammar_readers = Readers(_NUM_READER_THREADS, "grammar-reader")
        self.grammars = GrammarChecker(_NUM_READER_THREADS)

    def caller(self, call: RunningCall) -> Caller:
        """Returns the caller; raises Unauthenticated."""
        return self.authenticator.identify(call.invocation_metadata() or (), call.peer(), call.auth_context())

    def require_model(self) -> ServedModel:
        if self.model is None:
            raise WorkerUnavailable(f"the model is still being loaded{self.dispatcher.doing()}; try again later")
        return self.model

    def received(
        self,
        context: grpc.aio.ServicerContext,
        message_class: type[M],
        prepare: Callable[[M, Reading], PreparedRequest],
        has_grammar: Callable[[M], bool],
    ) -> Source:
        """Returns the source of a request that is the message of a call."""

        async def receive(caller: Caller) -> tuple[Work, Prepare]:
            async with self.receiver.message(context, caller.name) as data:
                work = work_of(len(data))
                message = await self.read(caller, work, lambda: wire.parse(message_class, data))
            return Work.GRAMMAR if has_grammar(message) else work, functools.partial(prepare, message)

        return receive

    async def read(self, caller: Caller, work: Work, function: Callable[[], T]) -> T:
        """Runs `function`, which reads a request, where it holds up nobody. Raises what it raises, and QueueFull."""
        match work:
            case Work.QUICK:
                return function()
            case Work.LONG:
                return await self._readers.run(caller.name, function)
            case Work.GRAMMAR:
                return await self._grammar_readers.run(caller.name, function)

    async def request(self, message_class: type[M], context: grpc.aio.ServicerContext) -> tuple[M, Caller]:
        """Receives the message of a call that asks for no generation; returns it and its caller.

        Raises:
            Unauthenticated: the caller is unknown.
            MessageTooSlow, QueueFull, InvalidRequest: as `Receiver.message` and `wire.parse` do.
        """
        caller = self.caller(context)
        async with self.receiver.message(context, caller.name) as data:
            return await self.read(caller, work_of(len(data)), lambda: wire.parse(message_class, data)), caller

    def close(self) -> None:
        self._readers.close()
        self._grammar_readers.close()
        self.grammars.close()


@asynccontextmanager
async def open_generations(
    state: ServiceState,
    call: RunningCall,
    request_id: str,
    method: str,
    source: Source,
) -> AsyncIterator[list[Generation]]:
    """Opens a generation for each answer that a call asks for. Arguments as for `open_generation`.

    The request is read once, and the prompt is computed once: the first leaves its keys and values to the others.
    """
    async with AsyncExitStack() as stack:

        async def opened(own_id: str, source: Source) -> Generation:
            return await stack.enter_async_context(open_generation(state, call, own_id, method, source))

        first = await opened(request_id, source)
        generations = [first]
        for index in range(1, first.num_answers):
            again = given(Work.QUICK, functools.partial(_prepare_again, first.record, index))
            generations.append(await opened(f"{request_id}-{index}", again))
        yield generations


def _prepare_again(first: RequestRecord, index: int, reading: Reading) -> PreparedRequest:
    """Returns the request for one more answer to a request that has been read."""
    record = reading.record
    record.is_chat, record.wants_trace = first.is_chat, first.wants_trace
    record.prompt, record.output = first.prompt, None if first.output is None else ""
    assert first.prepared is not None
    return first.prepared.other_answer(index, record.request_id)


async def together(answers: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Runs all to their ends and returns the results in order. If one fails, the others end and its error is raised."""
    if len(answers) == 1:
        return [await answers[0]]
    tasks = [asyncio.create_task(answer) for answer in answers]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


@asynccontextmanager
async def open_generation(
    state: ServiceState,
    call: RunningCall,
    request_id: str,
    method: str,
    source: Source,
) -> AsyncIterator[Generation]:
    """Takes a call through its caller's limits into the queue, and gives its slot back at the end.

    Args:
        method: the full name, for spans and metrics.
        source: what receives the request, once its caller is known.
    """
    record = record_of_call(request_id, method, call)
    for observer in state.start_observers:
        observer(record)
    if record.trace_id:
        trace_id_of_task.set(record.trace_id)
    with observed(record, call, state.observers):
        record.caller = caller = state.caller(call)
        model = state.require_model()
        record.model = model.facts.name
        # A message on its way holds no place among the requests.
        work, prepare = await source(caller)
        with state.admission.admit(caller) as place:
            reading = Reading(record, model, state.settings, caller, state.grammars.check)
            record.prepared = prepared = await state.read(caller, work, functools.partial(prepare, reading))
            record.trail = state.auditor.trail(prepared.request)
            state.admission.claim(place, prepared.request.num_cache_tokens)
            seconds_left = call.time_remaining()
            generation = Generation(state.dispatcher, model, prepared, place, seconds_left, record)
            with at_end_of_call(call, generation.close):
                yield generation


@asynccontextmanager
async def errors_to_status(context: grpc.aio.ServicerContext) -> AsyncIterator[str]:
    """Gives the call its request id and turns exceptions into the call's status."""
    request_id = uuid.uuid4().hex
    request_id_of_task.set(request_id)
    try:
        yield request_id
    except grpc.aio.InternalError:
        raise asyncio.CancelledError from None  # the caller is gone; gRPC would write a traceback
    except grpc.aio.BaseError:
        raise  # the call itself is over
    except Exception as error:
        failure = logged_failure(error, request_id)
        try:
            await context.abort(failure.code, failure.message, failure.trailing_metadata)
        except grpc.aio.AbortError as ended:
            # gRPC leaves it in a cycle, and tracebacks hold all variables of the call.
            error.__traceback__ = None
            over = ended
            context.add_done_callback(lambda _: traceback.clear_frames(over.__traceback__))
            raise


def logged_failure(error: Exception, request_id: str) -> Failure:
    """Returns the status that tells a caller of `error`, which is being handled, and logs it."""
    failure = failure_of(error, request_id)
    if failure.is_internal:
        logger.exception("unexpected error")
    else:
        logger.info("refused: %s %s", failure.code.name, type(error).__name__)
    return failure
