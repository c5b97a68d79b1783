"""Requests that wait for a slot, first come, first served. Knows requests and their constraints; knows no slots."""

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass

from dash_runtime.config import GenerationRequest
from dash_runtime.engine.constraints import ConstraintCompiler, TextConstraint
from dash_runtime.errors import InvalidRequest
from dash_runtime.layers.kv_cache import SequenceCache

_A_MOMENT = 0.01


@dataclass(frozen=True, slots=True)
class Waiting:
    """A request, since when it waits, and its constraint."""

    request: GenerationRequest
    since: float
    compiling: Future[TextConstraint] | None

    @property
    def is_ready(self) -> bool:
        """True if it has no constraint, or one that is compiled."""
        return self.compiling is None or (self.compiling.done() and self.compiling.exception() is None)

    @property
    def constraint(self) -> TextConstraint | None:
        """Its compiled constraint."""
        return None if self.compiling is None else self.compiling.result()


class WaitingLine:
    """The requests of one engine. Without a compiler it takes none that has a constraint.

    Constraints are compiled one by one in a thread, since one may take a tenth of a second and others decode meanwhile.
    """

    def __init__(self, constraints: ConstraintCompiler | None) -> None:
        self._constraints = constraints
        self._line: deque[Waiting] = deque()

    def __len__(self) -> int:
        return len(self._line)

    def add(self, request: GenerationRequest) -> None:
        """Adds a request at the end.

        Raises:
            InvalidRequest: it has a constraint, and there is no compiler.
        """
        compiling = None
        if request.constraint is not None:
            if self._constraints is None:
                raise request.constraint.refusal("needs a tokenizer, and this engine has none")
            compiling = self._constraints.begin(request.constraint)
        self._line.append(Waiting(request, time.monotonic(), compiling))

    def drop(self, request_id: str) -> None:
        """Forgets a request, whose constraint is not compiled any more; unknown ids are ignored."""
        dropped = [waiting for waiting in self._line if waiting.request.request_id == request_id]
        for waiting in dropped:
            self._line.remove(waiting)
            if waiting.compiling is not None:
                waiting.compiling.cancel()

    def refused(self) -> tuple[GenerationRequest, InvalidRequest] | None:
        """Takes a request whose constraint cannot be used, and why; None: there is none now."""
        for waiting in self._line:
            if waiting.compiling is not None and waiting.compiling.done():
                error = waiting.compiling.exception()
                if error is not None:
                    self._line.remove(waiting)
                    if isinstance(error, InvalidRequest):
                        return waiting.request, error
                    assert waiting.request.constraint is not None
                    return waiting.request, waiting.request.constraint.refusal("the grammar library failed on it")
        return None

    def next(self, reserve: Callable[[int], SequenceCache | None]) -> tuple[Waiting, SequenceCache] | None:
        """Takes the first request that is ready if there is one and `reserve` has a cache of its size."""
        first = next((waiting for waiting in self._line if waiting.is_ready), None)
        if first is None:
            return None
        cache = reserve(first.request.num_cache_tokens)
        if cache is None:
            return None  # else smaller requests might overtake the oldest for ever
        self._line.remove(first)
        return first, cache

    def wait_a_moment(self) -> None:
        """Waits a hundredth of a second at most until the first request is ready: there is nothing else to do."""
        if self._line and (compiling := self._line[0].compiling) is not None:
            wait([compiling], _A_MOMENT)
