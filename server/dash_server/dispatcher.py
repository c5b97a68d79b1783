"""Hands waiting requests to workers.

Requests wait here, in a queue that is fair between callers. A request goes to a worker only when the worker has a slot
and cache room for it. So the first free worker serves the next request, and one that has not begun can still be taken
back. Knows requests and workers; knows no gRPC and no text.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dash_runtime.config import GenerationRequest
from dash_runtime.events import SequenceFinished
from dash_server.admission import Place
from dash_server.fair_queue import Priority, PriorityQueue
from dash_server.pace import Pace
from dash_server.statuses import DeadlineTooShort, QueueFull, ServiceError, WorkerUnavailable
from dash_server.worker.link import WorkerLink
from dash_server.worker.outbox import Delivery, Outbox


@dataclass(slots=True)
class _Waiting:
    request: GenerationRequest
    outbox: Outbox
    place: Place
    priority: Priority
    since: float


@dataclass(frozen=True, slots=True)
class Load:
    """Requests, room and speed at one moment."""

    num_running: int
    num_waiting: int
    num_slots: int
    """Slots of the workers that take requests; `num_workers` and `num_cache_tokens` are theirs too."""
    num_workers: int
    num_reserved_tokens: int
    """KV cache tokens of running requests."""
    num_cache_tokens: int
    decode_tokens_per_second: float | None
    """Speed of one stream, the median of the latest requests; None before any."""
    prefill_tokens_per_second: float | None


class Dispatcher:
    """Spreads requests over workers."""

    def __init__(self, pace: Pace, clock: Callable[[], float] = time.monotonic) -> None:
        self._pace = pace
        self._clock = clock
        self._links: Sequence[WorkerLink] = ()
        self._queue: PriorityQueue[_Waiting] = PriorityQueue()
        self._waiting: dict[str, _Waiting] = {}
        self._running: dict[str, tuple[WorkerLink, Place]] = {}
        self._background: dict[str, int] = {}
        """KV cache tokens of the work for idle times, by request id."""
        self.before_submit: list[Callable[[], None]] = []
        """Called before a request is queued, except for work for idle times."""
        self.when_idle: list[Callable[[], None]] = []
        """Called when no request is running or waiting any more."""

    def attach(self, links: Sequence[WorkerLink]) -> None:
        """Sets the workers, which report back here."""
        self._links = links

    @property
    def is_ready(self) -> bool:
        """True if any worker takes requests."""
        return any(link.is_ready for link in self._links)

    def doing(self) -> str:
        """Returns what a worker that is not ready is doing, in brackets; empty if none says."""
        return next((f" ({link.doing})" for link in self._links if link.doing and not link.is_ready), "")

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_slots(self) -> int:
        """Slots of all ready workers; at least 1."""
        return max(1, sum(link.num_slots for link in self._links if link.is_ready))

    @property
    def is_idle(self) -> bool:
        """True if no request is here or at a worker."""
        return not self._waiting and not self._running

    def load(self) -> Load:
        """Returns what is here and at the workers."""
        ready = [link for link in self._links if link.is_ready]
        at_workers = self._background.keys() & self._running.keys()
        num_background_tokens = sum(self._background[request_id] for request_id in at_workers)
        return Load(
            num_running=len(self._running) - len(at_workers),
            num_waiting=len(self._waiting),
            num_slots=sum(link.num_slots for link in ready),
            num_workers=len(ready),
            num_reserved_tokens=sum(link.num_reserved_tokens for link in self._links) - num_background_tokens,
            num_cache_tokens=sum(link.num_cache_tokens for link in ready),
            decode_tokens_per_second=self._pace.decode_tokens_per_second,
            prefill_tokens_per_second=self._pace.prefill_tokens_per_second,
        )

    def submit(
        self,
        request: GenerationRequest,
        place: Place,
        *,
        delivery: Delivery = Delivery.AT_ONCE,
        priority: Priority = Priority.NORMAL,
        is_background: bool = False,
        least_tokens: int = 1,
        seconds_left: float | None = None,
    ) -> Outbox:
        """Queues a request for the next worker that has room.

        Args:
            delivery: when its tokens are wanted.
            priority: its class in the queue.
            is_background: whether it is work for idle times, which is no load. Whoever submits it cancels it in
                `before_submit`.
            least_tokens: output tokens without which the request is of no use.
            seconds_left: time until its deadline.

        Raises:
            WorkerUnavailable: no worker is ready.
            DeadlineTooShort: the request could not be served in time.
        """
        if not self.is_ready:
            raise WorkerUnavailable(f"no worker is ready at the moment{self.doing()}; try again later")
        if seconds_left is not None:
            ahead = self._queue.num_ahead(priority, place.caller.name)
            num_prompt_tokens = len(request.prompt_token_ids)
            least_seconds = self._pace.least_seconds(ahead, self.num_slots, num_prompt_tokens, least_tokens)
            if least_seconds > seconds_left:
                raise DeadlineTooShort(least_seconds, seconds_left)
        if is_background:
            self._background[request.request_id] = request.num_cache_tokens
        else:
            for notify in self.before_submit:
                notify()
        waiting = _Waiting(request, Outbox(request.request_id, delivery), place, priority, self._clock())
        caller = place.caller
        self._waiting[request.request_id] = waiting
        self._queue.push(waiting, priority, caller.name, request.num_cache_tokens, caller.limits.weight)
        self.dispatch()
        return waiting.outbox

    def dispatch(self) -> None:
        """Hands out requests while there is room. A large request in front is not overtaken, so it never starves."""
        while (waiting := self._queue.head()) is not None:
            request = waiting.request
            able = [link for link in self._suited(request) if link.has_room_for(request)]
            if not able:
                return
            self._queue.pop()
            del self._waiting[request.request_id]
            waiting.outbox.queue_seconds = self._clock() - waiting.since
            link = min(able, key=lambda link: link.num_reserved_tokens)
            self._running[request.request_id] = link, waiting.place
            link.submit(request, waiting.outbox)

    def _suited(self, request: GenerationRequest) -> Sequence[WorkerLink]:
        """Returns the workers that take requests and allow this one; all of them if none does, so that one says why."""
        ready = [link for link in self._links if link.is_ready]
        return [link for link in ready if link.allows(request)] or ready

    def cancel(self, request_id: str) -> bool:
        """Removes the request here and at its worker. Returns False if it was over already."""
        self._background.pop(request_id, None)
        waiting = self._waiting.pop(request_id, None)
        if waiting is not None:
            self._queue.remove(waiting, waiting.priority, waiting.place.caller.name)
            return True
        running = self._running.pop(request_id, None)
        if running is None:
            return False
        link, _ = running
        link.cancel(request_id)
        self._go_on()
        return True

    def stop(self, request_id: str) -> None:
        """Finishes a running request now, because a stop string was met."""
        if (running := self._running.get(request_id)) is not None:
            link, _ = running
            link.stop(request_id)

    def fail_all(self, error: ServiceError) -> None:
        """Ends every request with `error`, at the workers too."""
        self._fail_waiting(error)
        for link in self._links:
            link.fail_all(error)

    def longest_line(self, but: str) -> int:
        """See `admission.WaitingRoom`."""
        caller, length = self._queue.longest_line()
        return 0 if caller == but else length

    def evict_newest(self, but: str) -> None:
        """See `admission.WaitingRoom`."""
        caller, _ = self._queue.longest_line()
        assert caller != but
        waiting = self._queue.newest(caller)
        self.cancel(waiting.request.request_id)
        waiting.place.release()
        waiting.outbox.fail(QueueFull(len(self._waiting), self.retry_seconds()))

    def retry_seconds(self) -> float:
        """Estimates the time after which a refused caller should retry."""
        return self._pace.retry_seconds(self.num_slots)

    def on_over(self, request: GenerationRequest, finished: SequenceFinished | None) -> None:
        """Takes a link's report that a request left its worker; `finished` is None if it did not finish by itself."""
        if (running := self._running.pop(request.request_id, None)) is not None:
            _, place = running
            place.release()  # a caller that does not read keeps nobody else out
        was_background = self._background.pop(request.request_id, None) is not None
        if finished is not None and not was_background:
            self._pace.observe(
                finished.prefill_seconds,
                len(request.prompt_token_ids) - finished.num_cached_prompt_tokens,
                finished.decode_seconds,
                finished.num_output_tokens - 1,
            )
        self._go_on()

    def _go_on(self) -> None:
        """Uses the room that a request has left."""
        self.dispatch()
        if self.is_idle:
            for notify in self.when_idle:
                notify()

    def on_change(self) -> None:
        """Takes a report that a worker takes requests or no longer does.

        With no worker left, all waiting requests fail at once: their callers may know another server.
        """
        if self.is_ready:
            self.dispatch()
        else:
            self._fail_waiting(WorkerUnavailable("the worker was lost before it could take the request; try again"))

    def _fail_waiting(self, error: ServiceError) -> None:
        for request_id, waiting in list(self._waiting.items()):
            self.cancel(request_id)
            waiting.outbox.fail(error)
