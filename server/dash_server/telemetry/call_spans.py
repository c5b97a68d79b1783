"""Makes the span tree of a call that is over: the server's span, the generation's, and the worker's tokens below it.

    dash_api.v1.GenerationService/StreamGenerate    RPC conventions
      text_completion {model}                       GenAI conventions
        token, draft, …                             see `token_spans`

Knows neither the sampling rule nor where spans go. All times come from one machine's clock. If two processes' readings
differ, a child is cut to its parent.
"""

import json
from collections.abc import Iterator, Sequence

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.trace import SpanKind
from opentelemetry.trace.status import Status, StatusCode

from dash_runtime.constraint import ConstraintKind
from dash_runtime.decision_trace import DecisionTrace
from dash_server.from_pb import PreparedRequest
from dash_server.request_record import PROVIDER_NAME, RequestRecord
from dash_server.telemetry.span_tree import Attributes, SpanTree
from dash_server.telemetry.token_spans import SpanOptions, TokenSpans, layer_counts
from dash_server.telemetry.trace_sampling import SERVER_FAULTS

_MAX_INT64 = 2**63 - 1
# A collector refuses a whole batch over 4 MiB.
_MAX_CONTENT_CHARS = 32_768


class CallSpans:
    """The spans of one call. Iterating makes them."""

    def __init__(
        self,
        record: RequestRecord,
        decision_trace: DecisionTrace | None,
        options: SpanOptions,
        resource: Resource,
        worker_resource: Resource,
    ) -> None:
        """`record` must be over and have a trace id. `decision_trace` is None if the worker sent none."""
        self._record = record
        num_prompt_tokens = 0 if record.prepared is None else len(record.prepared.request.prompt_token_ids)
        self._steps = None if decision_trace is None else TokenSpans(decision_trace, options, num_prompt_tokens)
        self._decision_trace = decision_trace
        self._options = options
        self._resource = resource
        self._worker_resource = worker_resource
        self.num_spans = 1 + (record.prepared is not None) + (0 if self._steps is None else self._steps.num_spans)
        """An upper bound."""

    def __iter__(self) -> Iterator[ReadableSpan]:
        """Yields the spans, parents first."""
        record = self._record
        assert record.ended_unix_ns is not None
        tree, worker_tree = (
            SpanTree(int(record.trace_id, 16), record.caller_span, resource)
            for resource in (self._resource, self._worker_resource)
        )
        is_error = record.code in SERVER_FAULTS
        status = Status(StatusCode.ERROR, record.reason) if is_error else Status(StatusCode.UNSET)
        start, end = record.started_unix_ns, record.ended_unix_ns
        span, server = tree.span(
            record.method, None, start, end, _server_attributes(record), kind=SpanKind.SERVER, status=status
        )
        yield span
        if record.prepared is None:
            return
        attributes = _generation_attributes(record, record.prepared, self._options)
        if is_error:
            attributes["error.type"] = record.code.name
        if self._decision_trace is not None and self._decision_trace.price is not None:
            attributes["dash.price_of_compute"] = self._decision_trace.price
        if self._steps is not None:
            attributes["dash.untraced_steps"] = self._steps.num_untraced_steps
        name = f"{record.operation} {record.model}"
        events = _events(record, self._decision_trace)
        span, generation = tree.span(name, server, start, end, attributes, events=events, status=status)
        yield span
        if self._steps is not None:
            yield from self._steps.make(worker_tree, generation)


def _server_attributes(record: RequestRecord) -> Attributes:
    attributes: Attributes = {
        "rpc.system.name": "grpc",
        "rpc.method": record.method,
        "rpc.response.status_code": record.code.name,
        "dash.request_id": record.request_id,
    }
    if record.code in SERVER_FAULTS:
        attributes["error.type"] = record.code.name
    if record.reason is not None:
        attributes["dash.reason"] = record.reason
    return attributes


def _generation_attributes(record: RequestRecord, prepared: PreparedRequest, options: SpanOptions) -> Attributes:
    request = prepared.request
    sampling, skip = request.sampling, request.skip
    is_stream = record.method.endswith("/StreamGenerate")
    attributes: Attributes = {
        "gen_ai.operation.name": record.operation,
        "gen_ai.provider.name": PROVIDER_NAME,
        "gen_ai.request.model": record.model,
        "gen_ai.request.stream": is_stream,
        "gen_ai.request.max_tokens": request.stopping.max_new_tokens,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_k": sampling.top_k,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.response.id": record.request_id,
        "gen_ai.response.model": record.model,
        "gen_ai.usage.input_tokens": len(request.prompt_token_ids),
        "gen_ai.usage.output_tokens": record.num_output_tokens,
        "dash.request_id": record.request_id,
        "dash.mode": skip.mode.value,
    }
    # Seeds have 64 unsigned bits, OTLP's integers have a sign.
    if sampling.seed <= _MAX_INT64:
        attributes["gen_ai.request.seed"] = sampling.seed
    if request.constraint is not None:
        is_json = request.constraint.kind is ConstraintKind.JSON_SCHEMA
        attributes["gen_ai.output.type"] = "json" if is_json else "text"
        attributes["dash.constraint"] = "tool_calls" if prepared.calls_tools else request.constraint.kind.value
    if record.finish_reason is not None:
        attributes["gen_ai.response.finish_reasons"] = [record.finish_reason.value]
    if is_stream and record.first_token_unix_ns is not None:
        seconds = (record.first_token_unix_ns - record.started_unix_ns) / 1e9
        attributes["gen_ai.response.time_to_first_chunk"] = seconds
    if options.has_content:
        attributes |= _content(record, prepared.stop_strings)
    return attributes | _outcome(record)


def _outcome(record: RequestRecord) -> Attributes:
    """Returns the attributes that the engine's events give."""
    attributes: Attributes = {}
    if (granted := record.granted) is not None:
        attributes |= {"dash.policy": granted.policy, "dash.queue_seconds": record.queue_seconds}
        attributes["dash.prefill_action"] = granted.prefill_action.name
        if granted.compute_budget is not None:
            attributes["dash.compute_budget"] = granted.compute_budget
    if (finished := record.finished) is not None:
        attributes |= {
            "gen_ai.usage.cache_read.input_tokens": finished.num_cached_prompt_tokens,
            "dash.mean_cost": finished.depth.mean_cost,
            "dash.exposed_policy_seconds": finished.depth.mean_exposed_seconds,
        } | layer_counts(finished.depth.action_counts)
        attributes |= layer_counts(finished.depth.speculative_action_counts, "dash.speculative_layers")
        if (speculation := finished.speculation) is not None:
            attributes |= {
                "dash.drafted_tokens": speculation.num_drafted,
                "dash.accepted_tokens": speculation.num_accepted,
                "dash.drafted_tokens.from_text": speculation.num_drafted_from_text,
                "dash.accepted_tokens.from_text": speculation.num_accepted_from_text,
                "dash.verifications": speculation.num_verifications,
            }
    return attributes


def _content(record: RequestRecord, stop_strings: Sequence[str]) -> Attributes:
    attributes: Attributes = {}
    if stop_strings:
        attributes["gen_ai.request.stop_sequences"] = stop_strings
    if record.prompt is not None:
        attributes["gen_ai.input.messages"] = _messages(record.prompt)
    if record.output is not None:
        attributes["gen_ai.output.messages"] = _messages([("assistant", record.output)])
    return attributes


def _messages(messages: Sequence[tuple[str, str]]) -> str:
    """Returns the messages in the JSON of the GenAI conventions. Cuts long ones."""
    shown, room = [], _MAX_CONTENT_CHARS
    for role, text in messages:
        if room <= 0:
            break
        shown.append({"role": role[:room], "parts": [{"type": "text", "content": text[:room]}]})
        room -= len(role) + len(text)
    return json.dumps(shown, ensure_ascii=False)


def _events(record: RequestRecord, decision_trace: DecisionTrace | None) -> list[Event]:
    # The worker's message of the slot comes with the first token, when the prefill is over.
    granted = record.granted_unix_ns if decision_trace is None else decision_trace.granted_unix_ns
    times = {"slot granted": granted, "first token": record.first_token_unix_ns}
    return [Event(name, timestamp=time) for name, time in times.items() if time is not None]
