"""Requests that wait for a slot, first come, first served. Knows requests and their constraints; knows no slots."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from dash_runtime.config import GenerationRequest
from dash_runtime.engine.constraints import ConstraintCompiler, TextConstraint
from dash_runtime.layers.kv_cache import SequenceCache


@dataclass(frozen=True, slots=True)
class Waiting:
    """A request, since when it waits, and its constraint."""

    request: GenerationRequest
    since: float
    constraint: TextConstraint | None


class WaitingLine:
    """The requests of one engine. Without a compiler it takes none that has a constraint."""

    def __init__(self, constraints: ConstraintCompiler | None) -> None:
        self._constraints = constraints
        self._line: deque[Waiting] = deque()

    def __len__(self) -> int:
        return len(self._line)

    def add(self, request: GenerationRequest) -> None:
        """Adds a request at the end.

        Raises:
            InvalidRequest: its constraint cannot be used.
        """
        constraint = None
        if request.constraint is not None:
            if self._constraints is None:
                raise request.constraint.refusal("needs a tokenizer, and this engine has none")
            constraint = self._constraints.compile(request.constraint)
        self._line.append(Waiting(request, time.monotonic(), constraint))

    def drop(self, request_id: str) -> None:
        """Forgets a request; unknown ids are ignored."""
        self._line = deque(waiting for waiting in self._line if waiting.request.request_id != request_id)

    def next(self, reserve: Callable[[int], SequenceCache | None]) -> tuple[Waiting, SequenceCache] | None:
        """Takes the first request if there is one and `reserve` has a cache of its size."""
        if not self._line:
            return None
        cache = reserve(self._line[0].request.num_cache_tokens)
        # Else smaller requests might overtake the oldest for ever.
        return None if cache is None else (self._line.popleft(), cache)
