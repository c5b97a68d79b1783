"""Carries one request from its slot to its last piece of text.

Joins the dispatcher's token ids and the text module. Knows no gRPC context and no admission.
"""

import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence

from dash_api.v1 import common_pb2, generation_pb2
from dash_runtime.events import EndReason, SequenceFinished, TokenLogprobs
from dash_server.admission import Place
from dash_server.audit import audited
from dash_server.dispatcher import Dispatcher
from dash_server.from_pb import PreparedRequest
from dash_server.request_record import RequestRecord
from dash_server.served_model import ServedModel
from dash_server.text import OutputText
from dash_server.to_pb import Event, Piece, finished_to_pb, started_to_pb
from dash_server.tools import ToolCallReader
from dash_server.worker.outbox import MergedOutput

logger = logging.getLogger(__name__)

# Bounds a message to a caller that reads slowly.
MAX_TOKENS_PER_MESSAGE = 256


class Generation:
    """A running request. Call `start`, then `next_piece` until it returns None, then `finish`; always `close`."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        model: ServedModel,
        prepared: PreparedRequest,
        place: Place,
        seconds_left: float | None,
        record: RequestRecord,
    ) -> None:
        """Submits the request, whose deadline is `seconds_left` away. Fills in `record` on the way.

        Raises:
            WorkerUnavailable: no worker is ready.
            DeadlineTooShort: the request could not be served in time.
        """
        self._dispatcher = dispatcher
        self._facts = model.facts
        self._prepared = prepared
        self._text = OutputText(model.tokenizer, prepared.stop_strings, prepared.stop_token_ids)
        self._tool_calls = ToolCallReader(f"{prepared.request.request_id}-") if prepared.calls_tools else None
        self._record = record
        self._finished: SequenceFinished | None = None
        self._outbox = dispatcher.submit(
            audited(prepared.request) if record.is_picked else prepared.request,
            place,
            delivery=prepared.delivery,
            priority=prepared.priority,
            least_tokens=prepared.least_tokens,
            seconds_left=seconds_left,
        )

    @property
    def record(self) -> RequestRecord:
        """The record that is filled in."""
        return self._record

    @property
    def num_top_logprobs(self) -> int:
        """The number of most probable tokens at each place that the caller asked for."""
        return self._prepared.num_top_logprobs

    @property
    def num_answers(self) -> int:
        """The number of answers that the caller asked for, this one included."""
        return self._prepared.num_answers

    async def start(self) -> generation_pb2.GenerationStarted:
        """Waits for the slot and returns the facts known by then."""
        granted = await self._outbox.granted()
        record = self._record
        record.granted, record.granted_unix_ns = granted, time.time_ns()
        record.queue_seconds = self._outbox.queue_seconds + granted.queue_seconds
        return started_to_pb(self._prepared, granted, self._facts)

    @property
    def is_over(self) -> bool:
        """True if there is no more output."""
        return self._finished is not None

    async def next_piece(self) -> Piece | None:
        """Waits for output and returns all that has arrived; None after the last."""
        while not self.is_over:
            if (piece := self._piece(await self._outbox.take(MAX_TOKENS_PER_MESSAGE))) is not None:
                return piece
        return None

    async def next_delta(self) -> generation_pb2.GenerationDelta | None:
        """Waits for output and returns all that has arrived as a message; None after the last."""
        piece = await self.next_piece()
        if piece is None:
            return None
        delta = generation_pb2.GenerationDelta()
        piece.write(delta)
        return delta

    def poll(self) -> Piece | None:
        """Returns output that has arrived; None if there is none now."""
        while not self.is_over and (output := self._outbox.poll(MAX_TOKENS_PER_MESSAGE)) is not None:
            if (piece := self._piece(output)) is not None:
                return piece
        return None

    def listen(self, listener: Callable[[], None] | None) -> None:
        """Has `listener` called when there may be output to poll, until it is None."""
        self._outbox.listener = listener

    def finish(self) -> generation_pb2.GenerationFinished:
        """Returns the reason for the end, the usage and the depth statistics."""
        record, finished = self._record, self._finished
        assert record.granted is not None, "finish() before start()"
        assert finished is not None, "finish() before the last delta"
        stop_string = self._text.stop_string
        record.finished = finished
        record.finish_reason = EndReason.STOP_STRING if stop_string is not None else finished.reason
        num_prompt_tokens = len(self._prepared.request.prompt_token_ids)
        logger.info(
            "finished: %d prompt tokens, %d output tokens, %.3f s queued, %.3f s prefill, %.3f s decode",
            num_prompt_tokens,
            record.num_output_tokens,
            record.queue_seconds,
            finished.prefill_seconds,
            finished.decode_seconds,
        )
        return finished_to_pb(finished, record.queue_seconds, num_prompt_tokens, record.num_output_tokens, stop_string)

    async def events(self) -> AsyncIterator[Event]:
        """Yields the start, the output as it comes, and the end."""
        yield await self.start()
        while (piece := await self.next_piece()) is not None:
            yield piece
        yield self.finish()

    def close(self) -> None:
        """Frees the slot if the request is not over. May be called more than once."""
        if self._dispatcher.cancel(self._prepared.request.request_id):
            logger.info("cancelled: the caller is gone, or its deadline has passed")

    def _piece(self, output: MergedOutput) -> Piece | None:
        """Returns what the caller gets of some output; None for nothing."""
        self._finished = output.finished
        if self._text.stop_string is not None:
            return None  # the worker made these before it heard of the stop string
        piece = self._text.push(output.token_ids)
        if self._text.stop_string is not None:
            output = output.first(piece.num_tokens)
            self._dispatcher.stop(self._prepared.request.request_id)
        tail = self._text.finish() if self._finished is not None else ""
        record = self._record
        if record.trail is not None:
            record.trail.add(output.token_ids, output.logprobs)
        if record.is_picked:
            output.logprobs = _shown(output.logprobs, self._prepared.request.logprobs)
        # Counts what the caller gets: the worker may make more before it hears of a stop string.
        record.count_tokens(len(output.token_ids))
        text = piece.text + tail
        calls: list[common_pb2.ToolCall] = []
        if record.output is not None:
            record.output += text
        if self._tool_calls is not None:
            text, calls = self._tool_calls.push(text)
            text += self._tool_calls.finish() if self._finished is not None else ""
        return Piece(text, output, calls) if output.token_ids or text or calls else None


def _shown(logprobs: Sequence[TokenLogprobs], num_top: int | None) -> list[TokenLogprobs]:
    """Returns the log probabilities that the caller of an audited request asked for."""
    return [] if num_top is None else [TokenLogprobs(entry.chosen, entry.top[:num_top]) for entry in logprobs]


async def collect(generation: Generation) -> generation_pb2.GenerateResponse:
    """Runs the generation to its end and returns the complete response."""
    started = await generation.start()
    output = generation_pb2.GenerationDelta()
    texts, actions = [], []
    while (delta := await generation.next_delta()) is not None:
        texts.append(delta.text)
        actions.append(delta.actions)
        output.token_ids.extend(delta.token_ids)
        output.logprobs.extend(delta.logprobs)
        output.tool_calls.extend(delta.tool_calls)
    output.text = "".join(texts)
    output.actions = b"".join(actions)
    return generation_pb2.GenerateResponse(started=started, output=output, finished=generation.finish())
