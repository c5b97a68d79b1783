"""Checks ADAPTIVE answers against full depth, a share of all and those that are asked for, while nothing else is to do.

An answer that is picked beforehand is made with the log probabilities of its most probable tokens; those of another
are found by running its tokens once more as it ran. Then they are run through full depth, as Score runs a given output,
and both are compared. A request that comes takes the check back at once, and it begins again later. Knows the
dispatcher; knows no gRPC and no exporters.
"""

import asyncio
import logging
import math
import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

from dash_runtime.config import GenerationRequest, Mode, SkipOptions, StoppingParameters
from dash_runtime.errors import InvalidRequest
from dash_runtime.events import TokenLogprobs
from dash_server.admission import Place
from dash_server.auth import Caller
from dash_server.dispatcher import Dispatcher
from dash_server.request_record import RequestRecord, Trail
from dash_server.statuses import AuditNotFound, ServiceError, ShuttingDown
from dash_server.worker.outbox import Delivery

logger = logging.getLogger(__name__)

_NUM_TOP = 20
"""The most probable tokens that are compared at each position."""
_MAX_WAITING = 16
_MAX_KEPT_TOKENS = 65_536
"""The most tokens of prompts and answers that are kept, to be asked for."""
_MAX_TOKENS_PER_OUTPUT = 256
_NUM_FOR_WARNING = 8
"""Answers over which a policy's divergence is averaged before it is judged."""
_LEAST_DIVERGENCE = 0.005
"""In nats. What a policy diverges by less is noise."""
_CALLER = Caller("audit")


@dataclass(frozen=True, slots=True)
class Audit:
    """The comparison of an answer with full depth, over its tokens after the first."""

    request_id: str
    policy: str
    compute_budget: float | None
    num_tokens: int
    agreement: float
    """Share of the tokens at which both would put out the same one."""
    logprob_gap: float
    """Mean log probability of the tokens that were put out, less full depth's, in nats."""
    divergence: float
    """Mean Kullback-Leibler divergence of the answer's path from full depth, in nats, over the most probable tokens of
    both and the rest as one: at most the whole one."""
    expected_divergence: float | None
    """The policy's own at this budget, when it was calibrated."""
    started_unix_ns: int = 0
    ended_unix_ns: int = 0


class Auditor:
    """Picks answers, keeps a few of them, and checks one at a time. `run` is a task of the event loop.

    Args:
        rate: share of the ADAPTIVE requests that are picked.
        warning_factor: warns where a policy diverges so many times as much as expected.
        max_kept: the latest answers, and results, that can be asked for.
    """

    def __init__(self, dispatcher: Dispatcher, rate: float, warning_factor: float, max_kept: int) -> None:
        self._dispatcher = dispatcher
        self._rate = rate
        self._warning_factor = warning_factor
        self._max_kept = max_kept
        self._random = random.Random()
        self._waiting: deque[RequestRecord] = deque(maxlen=_MAX_WAITING)
        self._latest: dict[str, RequestRecord] = {}
        """Answers that may be asked for, oldest first."""
        self._asked: dict[str, tuple[RequestRecord, asyncio.Future[Audit]]] = {}
        """Answers whose audits callers wait for, in this order."""
        self._results: dict[str, tuple[str, Audit]] = {}
        """Owner and result by request id, oldest first."""
        self._recent: dict[str, deque[float]] = {}
        """By policy: divergence over expected divergence."""
        self._warned: set[str] = set()
        self._checking: asyncio.Task[Audit] | None = None
        self._can_go_on = asyncio.Event()
        self._is_over = False
        self.observers: list[Callable[[Audit, RequestRecord], None]] = []
        """Called with each result and the record of its call."""
        dispatcher.before_submit.append(self._give_way)
        dispatcher.when_idle.append(self._can_go_on.set)

    def trail(self, request: GenerationRequest) -> Trail | None:
        """Returns what to keep of the answer to this request; None: it cannot be audited."""
        if request.skip.mode is not Mode.ADAPTIVE or request.scored_token_ids is not None:
            return None
        is_picked = self._random.random() < self._rate
        return Trail(is_picked) if is_picked or self._max_kept else None

    def keep(self, record: RequestRecord) -> None:
        """Takes a call that is over. An observer of calls."""
        if record.trail is None or record.finished is None or len(record.trail.token_ids) < 2:
            return  # the first token is full depth's own
        self._latest[record.request_id] = record
        while len(self._latest) > self._max_kept or sum(map(_num_tokens, self._latest.values())) > _MAX_KEPT_TOKENS:
            del self._latest[next(iter(self._latest))]
        if record.is_picked:
            self._waiting.append(record)
            self._go_on()

    async def audit(self, request_id: str, caller_name: str) -> Audit:
        """Returns the audit of one of the caller's own latest answers, once there is one.

        Raises:
            AuditNotFound: there is no such answer, it is not kept any more, or it belongs to another caller.
            InvalidRequest, ServiceError: its check failed, and it may be asked for again; or the server ends.
        """
        owner, result = self._results.get(request_id, ("", None))
        if result is not None and owner == caller_name:
            return result
        record = self._latest.get(request_id)
        if record is None or record.caller is None or record.caller.name != caller_name:
            raise AuditNotFound
        if self._is_over:
            raise ShuttingDown
        _, result_to_come = self._asked.setdefault(request_id, (record, asyncio.Future()))
        self._go_on()
        return await asyncio.shield(result_to_come)

    async def run(self) -> None:
        """Checks answers for ever, one at a time, whenever the dispatcher is idle."""
        try:
            while True:
                await self._can_go_on.wait()
                self._can_go_on.clear()
                while (record := self._next()) and self._dispatcher.is_idle and self._dispatcher.is_ready:
                    await self._check(record)
        finally:
            self._is_over = True
            for _, result_to_come in self._asked.values():
                _fail(result_to_come, ShuttingDown())

    def _go_on(self) -> None:
        if self._dispatcher.is_idle:
            self._can_go_on.set()

    def _next(self) -> RequestRecord | None:
        """Returns the answer to check next: those that are asked for come first."""
        for record, _ in self._asked.values():
            return record
        return self._waiting[0] if self._waiting else None

    async def _check(self, record: RequestRecord) -> None:
        self._checking = checking = asyncio.create_task(self._compare(record))
        try:
            await asyncio.wait({checking})
        finally:
            self._checking = None
            checking.cancel()
        if checking.cancelled():
            return  # a request came: later again
        if record in self._waiting:
            self._waiting.remove(record)
        _, result_to_come = self._asked.pop(record.request_id, (None, None))
        error = checking.exception()
        if isinstance(error, (ServiceError, InvalidRequest)):
            logger.info("not audited: %s", error)  # its worker is gone, say
            if result_to_come is not None:
                _fail(result_to_come, error)
            return
        self._report(record, checking.result())
        if result_to_come is not None:
            result_to_come.set_result(checking.result())

    async def _compare(self, record: RequestRecord) -> Audit:
        trail, granted, prepared = record.trail, record.granted, record.prepared
        assert trail is not None
        assert granted is not None, "keep() takes finished calls"
        assert prepared is not None
        started_unix_ns = time.time_ns()
        own = trail.logprobs or await self._logprobs(record.request_id, prepared.request, trail, prepared.request.skip)
        full = await self._logprobs(record.request_id, prepared.request, trail, SkipOptions(Mode.FULL_DEPTH))
        pairs = list(zip(own, full, strict=True))[1:]
        return Audit(
            record.request_id,
            granted.policy,
            granted.compute_budget,
            num_tokens=len(pairs),
            agreement=sum(ours.top[0][0] == fulls.top[0][0] for ours, fulls in pairs) / len(pairs),
            logprob_gap=math.fsum(ours.chosen - fulls.chosen for ours, fulls in pairs) / len(pairs),
            divergence=math.fsum(divergence(fulls, ours) for ours, fulls in pairs) / len(pairs),
            expected_divergence=granted.divergence,
            started_unix_ns=started_unix_ns,
            ended_unix_ns=time.time_ns(),
        )

    async def _logprobs(
        self, of_request_id: str, answered: GenerationRequest, trail: Trail, skip: SkipOptions
    ) -> list[TokenLogprobs]:
        """Runs the tokens of an answer, and returns the log probabilities at each."""
        request = GenerationRequest(
            request_id=f"audit-{of_request_id}",
            prompt_token_ids=answered.prompt_token_ids,
            stopping=StoppingParameters(len(trail.token_ids), ignore_eos=True),
            skip=skip,
            logprobs=_NUM_TOP,
            scored_token_ids=trail.token_ids,
            cache_namespace=answered.cache_namespace,
        )
        found: list[TokenLogprobs] = []
        place = Place(_CALLER, lambda _: None)
        outbox = self._dispatcher.submit(request, place, delivery=Delivery.WHOLE, is_background=True)
        try:
            await outbox.granted()
            is_over = False
            while not is_over:
                output = await outbox.take(_MAX_TOKENS_PER_OUTPUT)
                found += output.logprobs
                is_over = output.finished is not None
        finally:
            self._dispatcher.cancel(request.request_id)
        return found

    def _give_way(self) -> None:
        if self._checking is not None:
            self._checking.cancel()

    def _report(self, record: RequestRecord, audit: Audit) -> None:
        assert record.caller is not None
        self._results[audit.request_id] = record.caller.name, audit
        while len(self._results) > self._max_kept:
            del self._results[next(iter(self._results))]
        expected = audit.expected_divergence
        logger.info(
            "audited %s: %s, %d tokens, agreement %.3f, log probability %+.3f, divergence %.4f (calibrated: %s)",
            audit.request_id,
            audit.policy,
            audit.num_tokens,
            audit.agreement,
            audit.logprob_gap,
            audit.divergence,
            "unknown" if expected is None else f"{expected:.4f}",
        )
        for observe in self.observers:
            observe(audit, record)
        if expected is not None:
            self.judge(audit.policy, audit.divergence / max(expected, _LEAST_DIVERGENCE))

    def judge(self, policy: str, ratio: float) -> None:
        """Warns of a policy whose answers diverge too much, and again once it has been well in between."""
        recent = self._recent.setdefault(policy, deque(maxlen=_NUM_FOR_WARNING))
        recent.append(ratio)
        if len(recent) < _NUM_FOR_WARNING:
            return
        mean = math.fsum(recent) / len(recent)
        if mean <= self._warning_factor:
            self._warned.discard(policy)
        elif policy not in self._warned:
            self._warned.add(policy)
            logger.warning(
                "the answers of %s diverge from full depth %.1f times as much as when it was calibrated: its text was "
                "unlike what callers send; raise the budget, or train on such text",
                policy,
                mean,
            )


def audited(request: GenerationRequest) -> GenerationRequest:
    """Returns the request with the log probabilities that an audit compares."""
    return replace(request, logprobs=max(_NUM_TOP, request.logprobs or 0))


def _num_tokens(record: RequestRecord) -> int:
    assert record.prepared is not None
    assert record.trail is not None
    return len(record.prepared.request.prompt_token_ids) + len(record.trail.token_ids)


def _fail(result_to_come: "asyncio.Future[Audit]", error: Exception) -> None:
    result_to_come.set_exception(error)
    result_to_come.exception()  # nobody may wait any more: asyncio would log that


def divergence(full: TokenLogprobs, own: TokenLogprobs) -> float:
    """Returns the Kullback-Leibler divergence of `own` from `full` in nats, over the tokens that both have among their
    most probable ones and all others as one: at most the whole divergence."""
    known = dict(own.top)
    shared = [(logprob, known[token_id]) for token_id, logprob in full.top if token_id in known]
    rest_full = max(0.0, 1 - math.fsum(math.exp(logprob) for logprob, _ in shared))
    rest_own = max(1e-9, 1 - math.fsum(math.exp(logprob) for _, logprob in shared))
    total = math.fsum(math.exp(logprob) * (logprob - other) for logprob, other in shared)
    if rest_full > 0:
        total += rest_full * math.log(rest_full / rest_own)
    return max(0.0, total)
