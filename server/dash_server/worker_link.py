"""The server's end of the worker: passes requests on, hands out what comes back, restarts what dies.

Knows request ids and messages; knows no gRPC handlers and no text. One worker at a time.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing

from dash_runtime.config import GenerationRequest
from dash_server.messages import (
    Cancel,
    Finished,
    FromWorker,
    Ready,
    Refused,
    StartupFailed,
    StepEvents,
    Stop,
    Submit,
    WorkerConfig,
)
from dash_server.outbox import Outbox
from dash_server.statuses import ServiceError, WorkerUnavailable
from dash_server.worker_process import WorkerProcess

logger = logging.getLogger(__name__)

MAX_START_FAILURES = 5
_FIRST_RESTART_DELAY_SECONDS = 0.1
_MAX_RESTART_DELAY_SECONDS = 10.0


class WorkerStartError(Exception):
    """No worker can be had. `is_for_user` says whether changing a setting can help."""

    def __init__(self, description: str, *, is_for_user: bool) -> None:
        super().__init__(description)
        self.is_for_user = is_for_user


class _StartupDeath(Exception):
    """The worker was gone before it was ready."""


class WorkerLink:
    """Keeps one worker running while `run` does, and carries requests to it."""

    def __init__(
        self,
        command: Sequence[str],
        config: WorkerConfig,
        *,
        start_timeout_seconds: float,
        on_ready: Callable[[Ready], Awaitable[None]],
        on_lost: Callable[[], None],
    ) -> None:
        """`on_ready` is awaited before requests are taken; `on_lost` follows each of its returns once."""
        self._command = command
        self._config = config
        self._start_timeout_seconds = start_timeout_seconds
        self._on_ready = on_ready
        self._on_lost = on_lost
        self._worker: WorkerProcess | None = None
        self._is_ready = False
        self._outboxes: dict[str, Outbox] = {}

    def submit(self, request: GenerationRequest) -> Outbox:
        """Queues the request at the worker.

        Raises:
            WorkerUnavailable: no worker is ready.
        """
        if self._worker is None or not self._is_ready:
            raise WorkerUnavailable("the model is not loaded at the moment; try again later")
        outbox = Outbox(request.request_id)
        self._outboxes[request.request_id] = outbox
        self._worker.send(Submit(request))
        return outbox

    def cancel(self, request_id: str) -> bool:
        """Forgets the request here and at the worker; False if it was over already."""
        if self._outboxes.pop(request_id, None) is None:
            return False
        if self._worker is not None:
            self._worker.send(Cancel(request_id))
        return True

    def stop(self, request_id: str) -> None:
        """Has the request finished now, as by a stop string, unless it is over."""
        if request_id in self._outboxes and self._worker is not None:
            self._worker.send(Stop(request_id))

    def fail_all(self, error: ServiceError) -> None:
        """Ends every request with `error`, at the worker too."""
        for request_id, outbox in list(self._outboxes.items()):
            self.cancel(request_id)
            outbox.fail(error)

    def kill(self) -> None:
        """Ends the worker at once, for a server that exits at once."""
        if self._worker is not None:
            self._worker.kill()

    async def run(self) -> None:
        """Starts the worker, and again whenever it dies. Ends, the worker with it, when cancelled.

        Raises:
            WorkerStartError: the first worker refuses to start or takes too long, or too many in a row
                died while starting.
            DashRuntimeError: raised by `on_ready`.
        """
        num_failures = 0
        has_started = False
        while True:
            try:
                await self._run_one()
                has_started = True
                num_failures = 0
            except _StartupDeath as death:
                num_failures += 1
                logger.error("start %d of %d failed: %s", num_failures, MAX_START_FAILURES, death)
                if num_failures == MAX_START_FAILURES:
                    raise WorkerStartError(
                        f"the worker died {num_failures} times in a row while starting; {death}",
                        is_for_user=False,
                    ) from None
            except WorkerStartError as error:
                # What refused once after it worked before may work again, as when memory is still held.
                if not has_started:
                    raise
                num_failures += 1
                logger.error("restart %d of %d failed: %s", num_failures, MAX_START_FAILURES, error)
                if num_failures == MAX_START_FAILURES:
                    raise
            delay = _FIRST_RESTART_DELAY_SECONDS * 2**num_failures
            await asyncio.sleep(min(delay, _MAX_RESTART_DELAY_SECONDS))

    async def _run_one(self) -> None:
        """One worker, from its start to its death. Returns if it had become ready."""
        self._worker = worker = await WorkerProcess.spawn(self._command)
        try:
            async with aclosing(worker.messages()) as messages:
                worker.send(self._config)
                ready = await self._startup(anext(messages, None))
                logger.info(
                    "worker %d is ready: %s on %s, loaded in %.1f s",
                    worker.pid,
                    ready.facts.name,
                    ready.facts.device,
                    ready.load_seconds,
                )
                await self._on_ready(ready)
                self._is_ready = True
                async for message in messages:
                    self._deliver(message)
                logger.error("worker %d is lost", worker.pid)
        finally:
            was_ready, self._is_ready = self._is_ready, False
            if was_ready:
                self._on_lost()
            self._worker = None
            self.fail_all(WorkerUnavailable("the worker was lost while it had the request; try again"))
            logger.info("worker %d ended with status %d", worker.pid, await worker.stop())

    async def _startup(self, first_message: Awaitable[FromWorker | None]) -> Ready:
        try:
            message = await asyncio.wait_for(first_message, self._start_timeout_seconds)
        except TimeoutError:
            raise WorkerStartError(
                f"the worker was not ready within {self._start_timeout_seconds:g} s (DASH_START_TIMEOUT_SECONDS)",
                is_for_user=False,
            ) from None
        match message:
            case Ready():
                return message
            case StartupFailed():
                raise WorkerStartError(message.description, is_for_user=True)
            case _:
                raise _StartupDeath("it ended before it was ready, see the log above")

    def _deliver(self, message: FromWorker) -> None:
        if not isinstance(message, StepEvents):
            logger.error("a ready worker sent %s", type(message).__name__)
            return
        for event in message.events:
            outbox = self._outboxes.get(event.request_id)
            if outbox is None:
                continue  # cancelled here while the event was on its way
            if isinstance(event, Finished | Refused):
                del self._outboxes[event.request_id]
            outbox.put(event)
