"""Checks a share of ADAPTIVE answers against full depth, while nothing else is to do.

An audited answer is made with the log probabilities of its most probable tokens. Later its tokens are run through full
depth, as Score runs a given output, and both are compared. A request that comes takes the check back at once, and it
begins again later. Knows the dispatcher; knows no gRPC and no exporters.
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
from dash_server.request_record import RequestRecord
from dash_server.statuses import AuditNotFound, ServiceError

logger = logging.getLogger(__name__)

_NUM_TOP = 20
"""The most probable tokens that are compared at each position."""
_MAX_WAITING = 16
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
        max_results: the latest results that can be asked for.
    """

    def __init__(self, dispatcher: Dispatcher, rate: float, warning_factor: float, max_results: int) -> None:
        self._dispatcher = dispatcher
        self._rate = rate
        self._warning_factor = warning_factor
        self._max_results = max_results
        self._random = random.Random()
        self._waiting: deque[RequestRecord] = deque(maxlen=_MAX_WAITING)
        self._results: dict[str, tuple[str, Audit]] = {}
        """Owner and result by request id, oldest first."""
        self._recent: dict[str, deque[float]] = {}
        """By policy: divergence over expected divergence."""
        self._warned: set[str] = set()
        self._check: asyncio.Task[Audit] | None = None
        self._can_go_on = asyncio.Event()
        self.observers: list[Callable[[Audit, RequestRecord], None]] = []
        """Called with each result and the record of its call."""
        dispatcher.before_submit.append(self._give_way)
        dispatcher.when_idle.append(self._can_go_on.set)

    def picks(self, request: GenerationRequest) -> bool:
        """True if the answer to this request will be audited."""
        may_be = request.skip.mode is Mode.ADAPTIVE and request.scored_token_ids is None
        return may_be and self._random.random() < self._rate

    def keep(self, record: RequestRecord) -> None:
        """Takes a call that is over. An observer of calls."""
        if record.trail is None or record.finished is None or len(record.trail.token_ids) < 2:
            return  # the first token is full depth's own
        self._waiting.append(record)
        if self._dispatcher.is_idle:
            self._can_go_on.set()

    def result(self, request_id: str, caller_name: str) -> Audit:
        """Returns the result for one of the caller's own requests.

        Raises:
            AuditNotFound: it was not audited, not yet, too long ago, or belongs to another caller.
        """
        owner, audit = self._results.get(request_id, ("", None))
        if audit is None or owner != caller_name:
            raise AuditNotFound
        return audit

    async def run(self) -> None:
        """Checks answers for ever, one at a time, whenever the dispatcher is idle."""
        while True:
            await self._can_go_on.wait()
            self._can_go_on.clear()
            while self._waiting and self._dispatcher.is_idle and self._dispatcher.is_ready:
                record = self._waiting.popleft()
                self._check = check = asyncio.create_task(self._compare(record))
                try:
                    await asyncio.wait({check})
                finally:
                    self._check = None
                    check.cancel()
                if check.cancelled():
                    self._waiting.appendleft(record)  # a request came
                elif isinstance(error := check.exception(), (ServiceError, InvalidRequest)):
                    logger.info("not audited: %s", error)  # its worker is gone, say
                else:
                    self._report(record, check.result())

    async def _compare(self, record: RequestRecord) -> Audit:
        trail, granted, prepared = record.trail, record.granted, record.prepared
        assert trail is not None
        assert granted is not None, "keep() takes finished calls"
        assert prepared is not None
        request_id = f"audit-{record.request_id}"
        request = GenerationRequest(
            request_id=request_id,
            prompt_token_ids=prepared.request.prompt_token_ids,
            stopping=StoppingParameters(len(trail.token_ids), ignore_eos=True),
            skip=SkipOptions(Mode.FULL_DEPTH),
            logprobs=_NUM_TOP,
            scored_token_ids=trail.token_ids,
            cache_namespace=prepared.request.cache_namespace,
        )
        full: list[TokenLogprobs] = []
        started_unix_ns = time.time_ns()
        outbox = self._dispatcher.submit(request, Place(_CALLER, lambda _: None), is_background=True)
        try:
            await outbox.granted()
            is_over = False
            while not is_over:
                output = await outbox.take(_MAX_TOKENS_PER_OUTPUT)
                full += output.logprobs
                is_over = output.finished is not None
        finally:
            self._dispatcher.cancel(request_id)
        pairs = list(zip(trail.logprobs, full, strict=True))[1:]
        return Audit(
            record.request_id,
            granted.policy,
            granted.compute_budget,
            num_tokens=len(pairs),
            agreement=sum(own.top[0][0] == other.top[0][0] for own, other in pairs) / len(pairs),
            logprob_gap=math.fsum(own.chosen - other.chosen for own, other in pairs) / len(pairs),
            divergence=math.fsum(divergence(other, own) for own, other in pairs) / len(pairs),
            expected_divergence=granted.divergence,
            started_unix_ns=started_unix_ns,
            ended_unix_ns=time.time_ns(),
        )

    def _give_way(self) -> None:
        if self._check is not None:
            self._check.cancel()

    def _report(self, record: RequestRecord, audit: Audit) -> None:
        assert record.caller is not None
        self._results[audit.request_id] = record.caller.name, audit
        while len(self._results) > self._max_results:
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
