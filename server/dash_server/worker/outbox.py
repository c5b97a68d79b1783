"""Holds the worker's output of one request until the caller takes it.

A slow caller finds one merged output, bounded by the request's own length, never a queue of messages. Knows no gRPC and
no text.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto

from dash_runtime.errors import InvalidRequest
from dash_runtime.events import (
    EngineEvent,
    RequestRefused,
    SequenceFinished,
    SlotGranted,
    TokenLogprobs,
    TokenProduced,
)

# The tokens of an output that is wanted whole are taken in pieces, so that none of them holds up the event loop.
_MAX_HELD_TOKENS = 64


class Delivery(Enum):
    """The caller's wish for the tokens after the first one, which never waits."""

    AT_ONCE = auto()
    """Each step's tokens leave with it."""
    SHARED = auto()
    """They may wait for those of the next steps, as long as the server's setting says."""
    WHOLE = auto()
    """Nobody sees them before the end."""


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

    def __init__(self, request_id: str, delivery: Delivery = Delivery.AT_ONCE) -> None:
        self.request_id = request_id
        self.queue_seconds = 0.0
        """Time before the request went to the worker."""
        self.listener: Callable[[], None] | None = None
        """Called when the reader may poll, by whoever brings what is there."""
        self._delivery = delivery
        self._granted: SlotGranted | None = None
        self._has_had_tokens = False
        self._pending = MergedOutput()
        self._is_due = False
        """True if the reader is to have what is pending."""
        self._error: Exception | None = None
        self._change: asyncio.Future[None] | None = None
        """The future that the reader waits for."""

    def put(self, event: EngineEvent, *, may_share: bool = False) -> bool:
        """Adds an event, and wakes the reader.

        Args:
            may_share: whether a token may wait for later ones, if that is the caller's wish too.

        Returns:
            True if the reader was not woken, and `release` has to be called in time.
        """
        match event:
            case TokenProduced():
                return self._put_token(event, may_share)
            case SlotGranted():
                self._granted = event
            case SequenceFinished():
                self._pending.finished = event
            case RequestRefused():
                self._error = InvalidRequest(event.field, event.description)
        self.release()
        return False

    def _put_token(self, event: TokenProduced, may_share: bool) -> bool:
        pending = self._pending
        pending.token_ids.append(event.token_id)
        pending.actions += event.plan
        if event.logprobs is not None:
            pending.logprobs.append(event.logprobs)
        if self._has_had_tokens and not self._is_due:
            if self._delivery is Delivery.SHARED and may_share:
                return len(pending.token_ids) == 1  # those after it leave with it
            if self._delivery is Delivery.WHOLE and len(pending.token_ids) < _MAX_HELD_TOKENS:
                return False
        self._has_had_tokens = True
        self.release()
        return False

    def release(self) -> None:
        """Lets the reader have all that is here."""
        self._is_due = True
        if self.listener is not None:
            self.listener()
        if self._change is not None and not self._change.done():
            self._change.set_result(None)

    def fail(self, error: Exception) -> None:
        """Raises `error` in the current and every later wait, once the tokens before it are taken."""
        self._error = error
        self.release()

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
        while (output := self.poll(max_tokens)) is None:
            await self._next_change()
        return output

    def poll(self, max_tokens: int) -> MergedOutput | None:
        """Takes up to `max_tokens` if the reader is to have any or the end now. Raises like `granted` if not."""
        pending = self._pending
        if not (self._is_due and (pending.token_ids or pending.finished is not None)):
            if self._error is not None:
                raise self._error
            return None
        if len(pending.token_ids) <= max_tokens:
            self._pending, self._is_due = MergedOutput(), False
            return pending
        output = pending.first(max_tokens)
        pending.drop_first(max_tokens)
        return output

    async def _next_change(self) -> None:
        if self._error is not None:
            raise self._error
        self._change = asyncio.get_running_loop().create_future()
        await self._change
