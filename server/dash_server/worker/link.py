"""The server's link to one worker: sends requests, delivers events, and restarts a worker that dies or hangs.

Knows request ids and messages; knows no gRPC handlers, no text and no other worker.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass

import msgspec

from dash_runtime.config import GenerationRequest, ModelFacts
from dash_runtime.decision_trace import DecisionTrace
from dash_runtime.errors import InvalidRequest
from dash_runtime.events import CostStatus, RequestRefused, SequenceCancelled, SequenceFinished, TokenProduced
from dash_server.statuses import ServiceError, WorkerUnavailable
from dash_server.worker.flush import Flush
from dash_server.worker.messages import (
    Cancel,
    CostsJudged,
    FromWorker,
    GraphsFailed,
    Pong,
    Ready,
    Starting,
    StartupFailed,
    StepEvents,
    Stop,
    Submit,
    WorkerConfig,
)
from dash_server.worker.outbox import Outbox
from dash_server.worker.starter import StartAgain, Worker, WorkerDeath, WorkerStarter, WorkerStartError
from dash_server.worker.watchdog import kill_when_silent

logger = logging.getLogger(__name__)

MAX_FAILURES = 5
_FIRST_RESTART_DELAY_SECONDS = 0.1
_MAX_RESTART_DELAY_SECONDS = 10.0
# A worker that was ready for so long had started well, even if it served no request.
_SOUND_AFTER_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class LinkEvents:
    """A link's callbacks."""

    on_ready: Callable[[Ready], Awaitable[None]]
    """Awaited before the link takes requests."""
    on_change: Callable[[], None]
    """The link takes requests from now on, or no longer does."""
    on_over: Callable[[GenerationRequest, SequenceFinished | None], None]
    """A request has left the worker: with SequenceFinished, or None if it was refused, failed or lost."""
    on_decision_trace: Callable[[DecisionTrace], None]
    """A request's decision trace has come: before the request is over, or after it was cancelled."""
    on_facts: Callable[[ModelFacts], None]
    """The model's facts have changed: its budgets follow new costs."""


class WorkerLink:
    """Keeps one worker running while `run` runs, and carries requests to it."""

    def __init__(
        self,
        starter: WorkerStarter,
        config: WorkerConfig,
        events: LinkEvents,
        *,
        flush: Flush,
        start_timeout_seconds: float,
        silence_timeout_seconds: float,
    ) -> None:
        """Replaces a worker that does not respond for `silence_timeout_seconds`. `flush` is for this link alone."""
        self._starter = starter
        self._config = config
        self._events = events
        self._flush = flush
        self._start_timeout_seconds = start_timeout_seconds
        self._silence_timeout_seconds = silence_timeout_seconds
        self._worker: Worker | None = None
        self._ready: Ready | None = None
        self._requests: dict[str, tuple[GenerationRequest, Outbox]] = {}
        self._num_reserved_tokens = 0
        self.num_restarts = 0
        self.doing = ""
        """The work of a worker that is not ready, in one sentence; empty if it has not said."""
        self.cost_status = CostStatus()
        self._num_former_replacements = 0  # of cost tables, by workers that ended
        self._first_ready = asyncio.Event()
        self._has_given_tokens = False
        self._heard_at = 0.0
        self._is_draining = False

    @property
    def is_ready(self) -> bool:
        """True if the link takes requests."""
        return self._ready is not None and not self._is_draining

    @property
    def num_requests(self) -> int:
        """Requests at the worker."""
        return len(self._requests)

    @property
    def num_slots(self) -> int:
        """Slots of a ready worker, else 0."""
        ready = self._ready  # once: metrics are read in another thread
        return 0 if ready is None else ready.facts.num_slots

    @property
    def num_reserved_tokens(self) -> int:
        """KV cache tokens that are reserved for the worker's requests."""
        return self._num_reserved_tokens

    @property
    def num_cache_tokens(self) -> int:
        """KV cache tokens of a ready worker, else 0."""
        ready = self._ready
        return 0 if ready is None else ready.facts.cache_tokens

    @property
    def num_cost_table_replacements(self) -> int:
        """Times that this link's workers replaced their cost table."""
        return self._num_former_replacements + self.cost_status.num_replacements

    def has_room_for(self, request: GenerationRequest) -> bool:
        """True if the worker would give the request a slot at once."""
        if self._ready is None or self._is_draining or len(self._requests) >= self._ready.facts.num_slots:
            return False
        return self._num_reserved_tokens + request.num_cache_tokens <= self._ready.facts.cache_tokens

    def allows(self, request: GenerationRequest) -> bool:
        """True if the request is valid by the facts of the worker, which must be there. Workers may have different
        costs, and so different lowest budgets."""
        assert self._ready is not None
        try:
            self._ready.facts.validate_skip(request.skip)
        except InvalidRequest:
            return False
        return True

    def submit(self, request: GenerationRequest, outbox: Outbox) -> None:
        """Sends the request to the worker, which must have room for it."""
        assert self._worker is not None
        assert self.is_ready
        self._requests[request.request_id] = request, outbox
        self._num_reserved_tokens += request.num_cache_tokens
        self._worker.send(Submit(request))

    def cancel(self, request_id: str) -> None:
        """Drops the request here and at the worker. Its room is free at the worker's next step."""
        self._forget(request_id)
        if self._worker is not None:
            self._worker.send(Cancel(request_id))

    def stop(self, request_id: str) -> None:
        """Finishes the request now, because a stop string was met."""
        if self._worker is not None:
            self._worker.send(Stop(request_id))

    def fail_all(self, error: ServiceError) -> None:
        """Ends every request with `error`, at the worker too."""
        for request, outbox in list(self._requests.values()):
            self.cancel(request.request_id)
            outbox.fail(error)
            self._events.on_over(request, None)

    def drain(self) -> None:
        """Takes no more requests. Those at the worker go on."""
        self._is_draining = True
        self._events.on_change()

    def resume(self) -> None:
        """Takes requests again."""
        self._is_draining = False
        self._events.on_change()

    async def wait_ready(self) -> None:
        """Waits until a worker is ready for the first time."""
        await self._first_ready.wait()

    def kill(self) -> None:
        """Kills the worker without waiting, for a server that exits at once."""
        if self._worker is not None:
            self._worker.kill()

    async def run(self) -> None:
        """Starts the worker, and starts it again whenever it dies. When cancelled, ends the worker too.

        Raises:
            WorkerStartError: the first worker refused to start or took too long; or too many in a row died before one
                produced a token.
            DashRuntimeError: raised by `on_ready`.
        """
        num_failures = 0
        self._is_draining = False
        while True:
            try:
                await self._run_one()
                num_failures = 0
            except WorkerDeath as death:
                num_failures += 1
                logger.error("death %d of %d before a first token: %s", num_failures, MAX_FAILURES, death)
                if num_failures == MAX_FAILURES:
                    raise WorkerStartError(
                        f"the worker died {num_failures} times in a row before it gave a token; {death}",
                        is_for_user=False,
                    ) from None
            except StartAgain:
                pass
            except WorkerStartError as error:
                # A restart may work later, say once the dead worker's memory is free.
                if not self._first_ready.is_set():
                    raise
                num_failures += 1
                logger.error("restart %d of %d failed: %s", num_failures, MAX_FAILURES, error)
                if num_failures == MAX_FAILURES:
                    raise
            delay = _FIRST_RESTART_DELAY_SECONDS * 2**num_failures
            await asyncio.sleep(min(delay, _MAX_RESTART_DELAY_SECONDS))
            self.num_restarts += 1

    async def _run_one(self) -> None:
        """Runs one worker from start to death. Returns if the worker had proved that it works."""
        self._has_given_tokens = False
        deadline = asyncio.get_running_loop().time() + self._start_timeout_seconds
        async with self._until(deadline):
            self._worker = worker = await self._starter.start(self._on_doing)
        watch: asyncio.Task[None] | None = None
        ready_at = 0.0
        try:
            async with aclosing(worker.messages()) as messages:
                worker.send(self._config)
                async with self._until(deadline):
                    ready = await self._startup(messages)
                facts, seconds = ready.facts, ready.load_seconds
                logger.info("%s is ready: %s on %s, loaded in %.1f s", worker.name, facts.name, facts.device, seconds)
                await self._events.on_ready(ready)
                self._ready = ready
                self._first_ready.set()
                self._heard_at = ready_at = time.monotonic()
                self._events.on_change()
                watching = kill_when_silent(worker, lambda: self._heard_at, self._silence_timeout_seconds)
                watch = asyncio.create_task(watching)
                await worker.deliver(self._hear)
                logger.error("%s is lost", worker.name)
        finally:
            if watch is not None:
                watch.cancel()
            was_ready, self._ready = self._ready is not None, None
            self._num_former_replacements = self.num_cost_table_replacements
            self.cost_status = CostStatus()
            self._worker, self.doing = None, ""
            self.fail_all(WorkerUnavailable("the worker was lost while it had the request; try again"))
            if was_ready:
                self._events.on_change()
            logger.info("%s ended: %s", worker.name, await worker.stop())
        if not self._has_given_tokens and time.monotonic() - ready_at < _SOUND_AFTER_SECONDS:
            raise WorkerDeath("it was ready and then lost, see its log")

    async def _startup(self, messages: AsyncGenerator[FromWorker, None]) -> Ready:
        while True:
            match await anext(messages, None):
                case Starting(doing=doing):
                    self._on_doing(doing)
                case Ready() as ready:
                    return ready
                case StartupFailed(description=description):
                    raise WorkerStartError(description, is_for_user=True)
                case GraphsFailed() as failure:
                    self._deliver(failure)
                    raise StartAgain
                case _:
                    raise WorkerDeath("it ended before it was ready, see its log")

    @asynccontextmanager
    async def _until(self, deadline: float) -> AsyncIterator[None]:
        """Raises WorkerStartError at the loop's time `deadline`."""
        try:
            async with asyncio.timeout_at(deadline):
                yield
        except TimeoutError:
            doing = f"; at last: {self.doing}" if self.doing else ""
            limit = f"{self._start_timeout_seconds:g} s (DASH_START_TIMEOUT_SECONDS)"
            raise WorkerStartError(f"the worker was not ready within {limit}{doing}", is_for_user=False) from None

    def _on_doing(self, doing: str) -> None:
        self.doing = doing

    def _hear(self, message: FromWorker) -> None:
        self._heard_at = time.monotonic()
        self._deliver(message)

    def _deliver(self, message: FromWorker) -> None:
        if isinstance(message, Pong):
            return
        if isinstance(message, GraphsFailed):  # it ends now, as with any other death
            logger.error("the next worker runs without graphs, more slowly: %s", message.description)
            self._config = msgspec.structs.replace(self._config, use_graphs=False)
            return
        if isinstance(message, CostsJudged) and self._ready is not None:
            self.cost_status = message.status
            self._ready = msgspec.structs.replace(self._ready, facts=message.facts)
            if not self._is_draining:
                self._events.on_facts(message.facts)
            return
        if not isinstance(message, StepEvents):
            logger.error("a ready worker sent %s", type(message).__name__)
            return
        self._flush.begin_step(len(self._requests))
        for event in message.events:
            if isinstance(event, (SequenceFinished, SequenceCancelled)) and event.trace is not None:
                self._events.on_decision_trace(event.trace)
            entry = self._requests.get(event.request_id)
            if entry is None:
                continue  # cancelled here while the event was on its way
            request, outbox = entry
            self._flush.put(outbox, event)
            if isinstance(event, TokenProduced):
                self._has_given_tokens = True
            elif isinstance(event, (SequenceFinished, RequestRefused)):
                self._forget(event.request_id)
                self._events.on_over(request, event if isinstance(event, SequenceFinished) else None)
        self._flush.end_step()

    def _forget(self, request_id: str) -> None:
        entry = self._requests.pop(request_id, None)
        if entry is not None:
            self._num_reserved_tokens -= entry[0].num_cache_tokens
