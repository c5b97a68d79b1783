"""Holds the worker's output of one request until the caller takes it.

A slow caller finds one merged output, bounded by the request's own length, never a queue of messages. Knows no gRPC and
no text.
"""

import asyncio
from dataclasses import dataclass, field

from dash_runtime.errors import InvalidRequest
from dash_runtime.events import (
    EngineEvent,
    RequestRefused,
    SequenceFinished,
    SlotGranted,
    TokenLogprobs,
    TokenProduced,
)


@dataclass(slots=True)
class MergedOutput:
    """Tokens in order. Each has a row of `actions` and an entry of `logprobs`, if asked for."""

    token_ids: list[int] = field(default_factory=list)
    actions: bytearray = field(default_factory=bytearray)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finished: SequenceFinished | None = None
    """Set on a request's last output."""

    def first(self, num_tokens: int) -> "MergedOutput":
        """Returns only the first tokens."""
        row_length = len(self.actions) // len(self.token_ids) if self.token_ids else 0
        return MergedOutput(
            self.token_ids[:num_tokens],
            self.actions[: num_tokens * row_length],
            self.logprobs[:num_tokens],
        )

    def drop_first(self, num_tokens: int) -> None:
        row_length = len(self.actions) // len(self.token_ids) if self.token_ids else 0
        del self.token_ids[:num_tokens]
        del self.actions[: num_tokens * row_length]
        del self.logprobs[:num_tokens]


class Outbox:
    """One request's events, written by the worker link and read by the request's handler."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.queue_seconds = 0.0
        """Time before the request went to the worker."""
        self._granted: SlotGranted | None = None
        self._pending = MergedOutput()
        self._error: Exception | None = None
        self._changed = asyncio.Event()

    def put(self, event: EngineEvent) -> None:
        match event:
            case TokenProduced():
                self._pending.token_ids.append(event.token_id)
                self._pending.actions += event.plan
                if event.logprobs is not None:
                    self._pending.logprobs.append(event.logprobs)
            case SlotGranted():
                self._granted = event
            case SequenceFinished():
                self._pending.finished = event
            case RequestRefused():
                self._error = InvalidRequest(event.field, event.description)
        self._changed.set()

    def fail(self, error: Exception) -> None:
        """Raises `error` in the current and every later wait."""
        self._error = error
        self._changed.set()

    async def granted(self) -> SlotGranted:
        """Waits for the slot and returns the worker's event.

        Raises:
            InvalidRequest: the worker refused the request.
            ServiceError: the request cannot go on.
        """
        while self._granted is None:
            await self._next_change()
        return self._granted

    async def take(self, max_tokens: int) -> MergedOutput:
        """Waits for tokens or the end, and takes up to `max_tokens`. Raises like `granted`."""
        while not self._pending.token_ids and self._pending.finished is None:
            await self._next_change()
        if len(self._pending.token_ids) <= max_tokens:
            output, self._pending = self._pending, MergedOutput()
            return output
        output = self._pending.first(max_tokens)
        self._pending.drop_first(max_tokens)
        return output

    async def _next_change(self) -> None:
        if self._error is not None:
            raise self._error
        self._changed.clear()
        await self._changed.wait()
        if self._error is not None:
            raise self._error
