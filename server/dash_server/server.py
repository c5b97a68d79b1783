"""Builds the gRPC server from settings: services, health, reflection and the workers.

Knows no signals and no exit codes (`main` does), so it also runs inside a test.
"""

import asyncio
import gc
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import grpc
from grpc_channelz.v1 import channelz, channelz_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc

from dash_runtime.config import ModelFacts
from dash_runtime.decision_trace import DecisionTrace
from dash_server.admission import Admission
from dash_server.auth import Authenticator, CallerLimits
from dash_server.auth_interceptor import AuthInterceptor
from dash_server.dispatcher import Dispatcher
from dash_server.fair_queue import Priority
from dash_server.health import HealthServicer
from dash_server.listening import channel_options, listen, write_port_file
from dash_server.pace import Pace
from dash_server.request_record import RequestRecord
from dash_server.served_model import ServedModel
from dash_server.service import GENERATION_SERVICE, MODEL_SERVICE, add_to_server
from dash_server.service_state import ServiceState
from dash_server.settings import Settings
from dash_server.statuses import ShuttingDown
from dash_server.telemetry.exporting import is_disabled, is_exported
from dash_server.telemetry.metrics import Sources
from dash_server.telemetry.pending_traces import PendingTraces
from dash_server.worker.flush import Flush
from dash_server.worker.link import LinkEvents, WorkerLink
from dash_server.worker.messages import Ready
from dash_server.worker.starter import WorkerStarter
from dash_server.worker_pool import WorkerPool

if TYPE_CHECKING:
    from dash_server.telemetry.metric_export import MetricExport
    from dash_server.telemetry.tracing import Tracing

logger = logging.getLogger(__name__)

_HEALTH_SERVICE = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
VLLM_ENGINE_SERVICE = "vllm.grpc.engine.VllmEngine"
_CHANNELZ_SERVICE = channelz_pb2.DESCRIPTOR.services_by_name["Channelz"].full_name
_REFLECTION_V1 = "grpc.reflection.v1.ServerReflection"
# Time for the last calls to end.
_LAST_CALLS_SECONDS = 2.0


def _add_reflection(server: grpc.aio.Server, names: Sequence[str]) -> None:
    """Adds reflection under both of its names: newer clients ask for v1 only, whose messages are v1alpha's."""
    servicer = reflection.aio.ReflectionServicer(names)
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(servicer, server)
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(_REFLECTION_V1, {"ServerReflectionInfo": handler}),)
    )


class DashServer:
    """A server. Call `start`, then `run_workers` as a task, then `drain` if there is time, then `close`."""

    def __init__(self, settings: Settings, starter: WorkerStarter, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises TokenFileError if the token file cannot be used. `clock` says when workers are added and removed. The
        starter is the caller's to close, once the workers have ended."""
        self._settings = settings
        own_services = [GENERATION_SERVICE, MODEL_SERVICE, *([VLLM_ENGINE_SERVICE] if settings.vllm_engine else ())]
        self._health = HealthServicer(own_services)
        self.dispatcher = Dispatcher(Pace())
        self.admission = Admission(
            settings.slots * settings.workers.most + settings.max_queue,
            settings.max_queue_tokens,
            waiting_room=self.dispatcher,
            retry_seconds=self.dispatcher.retry_seconds,
        )
        highest = Priority[settings.highest_priority.upper()]
        limits = CallerLimits(max_requests=settings.max_requests_per_caller, highest=highest)
        authenticator = Authenticator(settings.token_file, limits)
        self._pending_traces = PendingTraces(self._on_decision_trace, self._on_complete)
        events = LinkEvents(
            self._on_ready, self._on_change, self.dispatcher.on_over, self._pending_traces.add, self._on_facts
        )
        self._links = [
            WorkerLink(
                starter,
                settings.worker_config(number),
                events,
                flush=Flush(settings.flush_milliseconds / 1e3),
                start_timeout_seconds=settings.start_timeout_seconds,
                silence_timeout_seconds=settings.worker_timeout_seconds,
            )
            for number in range(settings.workers.most)
        ]
        self.dispatcher.attach(self._links)
        self._pool = WorkerPool(self._links, settings.workers, self.dispatcher.load, clock)
        self._state = ServiceState(settings, self.admission, self.dispatcher, authenticator)
        self._server = grpc.aio.server(
            options=channel_options(settings),
            interceptors=[AuthInterceptor(authenticator, self._state.receiver, set(own_services), {_HEALTH_SERVICE})],
        )
        self._auditing: asyncio.Task[None] | None = None
        self._stopping: asyncio.Task[None] | None = None
        self.tracing: Tracing | None = None
        self.metrics: MetricExport | None = None
        """Both are set by `start`, if anything is exported."""
        add_to_server(self._state, self._server)
        if settings.vllm_engine:
            from dash_server.vllm_engine import add_vllm_engine  # needs the extra `smg`

            add_vllm_engine(self._state, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = [*own_services, _HEALTH_SERVICE, reflection.SERVICE_NAME]
        if settings.channelz:
            channelz.add_channelz_servicer(self._server)
            names.append(_CHANNELZ_SERVICE)
        _add_reflection(self._server, [*names, _REFLECTION_V1])

    async def start(self) -> int:
        """Listens and returns the port. Health is NOT_SERVING until a worker is ready.

        Raises:
            ListenError: the server may not or cannot listen on an address, or cannot write the port file.
        """
        port_file = self._settings.port_file
        if port_file is not None:
            port_file.unlink(missing_ok=True)
        port = listen(self._server, self._settings)
        self._start_tracing()
        self._start_metrics()
        await self._server.start()
        if self._settings.audit_rate or self._settings.recent_requests:
            self._auditing = asyncio.create_task(self._state.auditor.run())
        if port_file is not None:
            write_port_file(port_file, port)
        logger.info("listening on %s, port %d", self._settings.host, port)
        return port

    async def prepare(self) -> None:
        """Has a worker keep what later starts need, and takes no calls. Raises as `WorkerPool.prepare` does."""
        await self._pool.prepare()

    async def run_workers(self) -> None:
        """Keeps the workers running until it is cancelled. Raises as `WorkerPool.run` does."""
        await self._pool.run()

    async def drain(self, grace_seconds: float) -> None:
        """Takes no more calls and waits for the requests inside. After the grace, those left fail with UNAVAILABLE.

        The port is closed and every connection told to go away at once: clients and proxies then choose another
        server. If they were only refused here, they would come again with every call until the last request has ended.
        """
        self.admission.drain()
        self._stop_auditing()
        self._health.set_serving(False)
        self._stopping = asyncio.create_task(self._server.stop(grace_seconds + _LAST_CALLS_SECONDS))
        logger.info("draining: %d requests inside", self.admission.num_inside)
        try:
            await asyncio.wait_for(self.admission.wait_idle(), grace_seconds)
        except TimeoutError:
            logger.warning("the grace is over: %d requests are cut off", self.admission.num_inside)
            self.dispatcher.fail_all(ShuttingDown())

    async def close(self) -> None:
        """Ends the calls that are left, and exports the last telemetry. The workers end with `run_workers`."""
        self._health.close()
        self._stop_auditing()
        await self._server.stop(_LAST_CALLS_SECONDS)
        if self._stopping is not None:
            await self._stopping
        self._state.close()
        if self.tracing is not None:
            self._pending_traces.close()
            await asyncio.to_thread(self.tracing.close)
        if self.metrics is not None:
            await asyncio.to_thread(self.metrics.close)

    def kill_workers(self) -> None:
        """Kills the workers without waiting, for a process that exits at once."""
        for link in self._links:
            link.kill()

    def _stop_auditing(self) -> None:
        if self._auditing is not None:
            self._auditing.cancel()

    def _start_tracing(self) -> None:
        state = self._state
        if is_exported("traces", os.environ):
            from dash_server.telemetry.tracing import start_tracing  # imports the SDK, which is slow

            self.tracing = start_tracing(self._settings, os.environ)
        if self.tracing is not None:
            state.start_observers.append(self.tracing.begin)
            state.auditor.observers.append(self.tracing.audited)
        if self.tracing is not None or self._settings.recent_requests:
            state.start_observers.append(self._pending_traces.begin)
            state.observers.append(self._pending_traces.end)

    def _start_metrics(self) -> None:
        has_endpoint = self._settings.metrics_port is not None
        if has_endpoint and is_disabled(os.environ):
            logger.warning("DASH_METRICS_PORT: there is no endpoint, since OTEL_SDK_DISABLED is true")
            return
        has_collector = is_exported("metrics", os.environ)
        if has_endpoint or has_collector:
            from dash_server.telemetry.metric_export import start_metrics  # imports the SDK, which is slow

            sources = Sources(
                self.admission,
                self.dispatcher,
                self._links,
                self._model_name,
                self._dropped_spans,
                self._exported_spans,
            )
            self.metrics = start_metrics(self._settings, sources, has_collector)
            if self.metrics is not None:
                self._state.observers.append(self.metrics.observe)
                self._state.auditor.observers.append(self.metrics.observe_audit)

    def _dropped_spans(self) -> int:
        return 0 if self.tracing is None else self.tracing.export.dropped_spans

    def _exported_spans(self) -> int:
        return 0 if self.tracing is None else self.tracing.export.exported_spans

    def _model_name(self) -> str | None:
        model = self._state.model
        return None if model is None else model.facts.name

    def _on_decision_trace(self, record: RequestRecord, decision_trace: DecisionTrace) -> None:
        if self._settings.recent_requests:
            self._state.recent_decisions.keep(record, decision_trace)

    def _on_complete(self, record: RequestRecord, decision_trace: DecisionTrace | None) -> None:
        if self.tracing is not None:
            self.tracing.finish(record, decision_trace)

    async def _on_ready(self, ready: Ready) -> None:
        settings, is_first = self._settings, self._state.model is None
        self._state.model = await asyncio.to_thread(
            ServedModel.load,
            ready,
            settings.model,
            settings.model_revision,
            settings.cache_folder,
            self._state.model,
        )
        if is_first:
            # All modules are loaded, for good. The collector need not look at them, so it looks at the rest more often:
            # gRPC leaves every call in a cycle.
            gc.collect()
            gc.freeze()

    def _on_facts(self, facts: ModelFacts) -> None:
        if self._state.model is not None:
            self._state.model = replace(self._state.model, facts=facts)

    def _on_change(self) -> None:
        self._health.set_serving(self.dispatcher.is_ready and not self.admission.is_draining)
        self.dispatcher.on_change()
