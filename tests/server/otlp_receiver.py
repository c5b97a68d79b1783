"""A collector on a real socket: takes spans and metrics by OTLP over gRPC, and fails in many ways on demand."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span

SERVER_SPAN = "dash_api.v1.GenerationService/"


@dataclass
class OtlpReceiver:
    """The received messages, and the collector's behaviour. A test may change both while it runs."""

    port: int = 0
    spans: list[Span] = field(default_factory=list)
    resources: list[dict[str, Any]] = field(default_factory=list)
    """Those of all messages of spans, without repetition."""
    metrics: list[Any] = field(default_factory=list)
    received: list[bytes] = field(default_factory=list)
    """Every message, unchanged."""
    delay_seconds: float = 0.0
    refuse_with: grpc.StatusCode | None = None
    die_after: int | None = None
    """The batch of spans at which it stops listening, without an answer."""

    def __post_init__(self) -> None:
        self._server: grpc.Server | None = None
        self._let_go = threading.Event()

    def start(self) -> None:
        """Listens, on the same port as before if there was one."""
        server = grpc.server(ThreadPoolExecutor(4), options=[("grpc.so_reuseport", 0)])
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(_Traces(self), server)
        metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server(_Metrics(self), server)
        self.port = server.add_insecure_port(f"127.0.0.1:{self.port}")
        server.start()
        self._server = server

    def stop(self) -> None:
        self._let_go.set()
        if self._server is not None:
            self._server.stop(0).wait()
            self._server = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def behave(self, context: grpc.ServicerContext) -> None:
        """Does what the test asked for, in a handler, before it answers."""
        self._let_go.wait(self.delay_seconds)
        if self.refuse_with is not None:
            context.abort(self.refuse_with, "refused")
        if self.die_after is not None:
            self.die_after -= 1
            if self.die_after < 0:
                threading.Thread(target=self.stop).start()
                self._let_go.wait(5)
                context.abort(grpc.StatusCode.UNAVAILABLE, "dying")

    async def until(self, is_there: Callable[[], bool], seconds: float = 30) -> None:
        async with asyncio.timeout(seconds):
            while not is_there():
                await asyncio.sleep(0.01)

    async def trace(self) -> "Trace":
        """Returns the only trace, once it is complete."""
        await self.traces(1)
        return Trace(list(self.spans))

    async def traces(self, number: int) -> None:
        """Waits until this many traces have a root and nothing more has come for a moment."""
        await self.until(lambda: sum(span.name.startswith(SERVER_SPAN) for span in self.spans) >= number)
        num_spans = 0
        while num_spans < len(self.spans):
            num_spans = len(self.spans)
            await asyncio.sleep(0.15)


class _Traces(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self, receiver: OtlpReceiver) -> None:
        self._receiver = receiver

    def Export(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802 - gRPC's name
        receiver = self._receiver
        receiver.behave(context)
        receiver.received.append(request.SerializeToString())
        for resource_spans in request.resource_spans:
            resource = attributes_of(resource_spans.resource.attributes)
            if resource not in receiver.resources:
                receiver.resources.append(resource)
            for scope_spans in resource_spans.scope_spans:
                receiver.spans.extend(scope_spans.spans)
        return trace_service_pb2.ExportTraceServiceResponse()


class _Metrics(metrics_service_pb2_grpc.MetricsServiceServicer):
    def __init__(self, receiver: OtlpReceiver) -> None:
        self._receiver = receiver

    def Export(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802 - gRPC's name
        receiver = self._receiver
        receiver.behave(context)
        receiver.received.append(request.SerializeToString())
        for resource_metrics in request.resource_metrics:
            for scope_metrics in resource_metrics.scope_metrics:
                receiver.metrics.extend(scope_metrics.metrics)
        return metrics_service_pb2.ExportMetricsServiceResponse()


@contextmanager
def otlp_receiver() -> Iterator[OtlpReceiver]:
    """A collector that listens on a free port."""
    receiver = OtlpReceiver()
    receiver.start()
    try:
        yield receiver
    finally:
        receiver.stop()


def attributes_of(pairs: Any) -> dict[str, Any]:
    """Attributes as Python values."""
    return {pair.key: _value(pair) for pair in pairs}


def _value(pair: KeyValue) -> Any:
    kind = pair.value.WhichOneof("value")
    if kind == "array_value":
        return [value.string_value for value in pair.value.array_value.values]
    return getattr(pair.value, kind or "string_value")


class Trace:
    """The spans of one trace, and checks that hold for every trace."""

    def __init__(self, spans: list[Span]) -> None:
        self.spans = spans
        self._by_id = {span.span_id: span for span in spans}
        assert len({span.trace_id for span in spans}) == 1
        assert len(self._by_id) == len(spans), "two spans have one id"

    def named(self, name: str) -> list[Span]:
        """Returns the spans of this name, in order of their starts."""
        found = [span for span in self.spans if span.name == name]
        return sorted(
            found, key=lambda span: (span.start_time_unix_nano, attributes_of(span.attributes).get("dash.layer"))
        )

    @property
    def root(self) -> Span:
        (root,) = [span for span in self.spans if span.parent_span_id not in self._by_id]
        return root

    @property
    def generation(self) -> Span:
        (generation,) = [span for span in self.spans if "gen_ai.operation.name" in attributes_of(span.attributes)]
        return generation

    def children(self, parent: Span, name: str | None = None) -> list[Span]:
        return [span for span in self.spans if span.parent_span_id == parent.span_id and name in (None, span.name)]

    def check(self) -> None:
        """Checks that there is one root and no orphan, and that every span lies within its parent."""
        assert self.root.name.startswith(SERVER_SPAN)
        for span in self.spans:
            assert 0 < span.start_time_unix_nano <= span.end_time_unix_nano <= time.time_ns()
            parent = self._by_id.get(span.parent_span_id)
            if parent is not None:
                assert parent.start_time_unix_nano <= span.start_time_unix_nano
                assert span.end_time_unix_nano <= parent.end_time_unix_nano
