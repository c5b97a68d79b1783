"""The gRPC server put together: services, health, reflection and one worker, from settings.

Knows nothing of processes' signals and exit codes (that is `main`), so it also runs inside a test.
"""

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Sequence
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from dash_server.admission import Admission
from dash_server.health import HealthServicer
from dash_server.messages import Ready
from dash_server.served_model import ServedModel
from dash_server.service import GENERATION_SERVICE, MODEL_SERVICE, ServiceState, add_to_server
from dash_server.settings import Settings
from dash_server.statuses import ShuttingDown
from dash_server.worker_link import WorkerLink

logger = logging.getLogger(__name__)

_HEALTH_SERVICE = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
# How long calls may take to end once nothing keeps them.
_LAST_CALLS_SECONDS = 2.0


class DashServer:
    """Call `start`, then `run_worker` as a task, then `drain` if there is time, then `close`."""

    def __init__(self, settings: Settings, worker_command: Sequence[str]) -> None:
        self._settings = settings
        self._admission = Admission(settings.slots + settings.max_queue)
        self._health = HealthServicer([GENERATION_SERVICE, MODEL_SERVICE])
        self._link = WorkerLink(
            worker_command,
            settings.worker_config(),
            start_timeout_seconds=settings.start_timeout_seconds,
            on_ready=self._on_ready,
            on_lost=lambda: self._health.set_serving(False),
        )
        self._state = ServiceState(settings, self._admission, self._link)
        self._server = grpc.aio.server(options=_channel_options(settings))
        add_to_server(self._state, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection(
            (GENERATION_SERVICE, MODEL_SERVICE, _HEALTH_SERVICE, reflection.SERVICE_NAME), self._server
        )

    async def start(self) -> int:
        """Listens, and returns the port. Health is NOT_SERVING until the worker is ready.

        Raises:
            OSError: the address cannot be listened on, or the port file not be written.
        """
        host, port = self._settings.host, self._settings.port
        if self._settings.port_file is not None:
            self._settings.port_file.unlink(missing_ok=True)
        _try_to_bind(host, port)
        try:
            port = self._server.add_insecure_port(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
        except RuntimeError as error:
            raise OSError(str(error)) from error
        await self._server.start()
        if self._settings.port_file is not None:
            _write_atomically(self._settings.port_file, f"{port}\n")
        logger.info("listening on %s, port %d", host, port)
        return port

    async def run_worker(self) -> None:
        """Keeps a worker running; see `WorkerLink.run` for what is raised."""
        await self._link.run()

    async def drain(self, grace_seconds: float) -> None:
        """Refuses new requests, and waits for those inside; after the grace they fail as UNAVAILABLE."""
        self._admission.drain()
        self._health.set_serving(False)
        logger.info("draining: %d requests inside", self._admission.num_inside)
        try:
            await asyncio.wait_for(self._admission.wait_idle(), grace_seconds)
        except TimeoutError:
            logger.warning("the grace is over: %d requests are cut off", self._admission.num_inside)
            self._link.fail_all(ShuttingDown())

    async def close(self) -> None:
        """Ends what is left of the calls. The worker ends with `run_worker`."""
        self._health.close()
        await self._server.stop(_LAST_CALLS_SECONDS)
        self._state.close()

    def kill_worker(self) -> None:
        """Ends the worker at once, for a process that exits at once."""
        self._link.kill()

    async def _on_ready(self, ready: Ready) -> None:
        self._state.model = await asyncio.to_thread(ServedModel.load, ready)
        self._health.set_serving(not self._admission.is_draining)


def _channel_options(settings: Settings) -> list[tuple[str, int]]:
    return [
        # Without this, a second server on the same port would silently share it.
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        # Clients may ping every 10 s to keep a connection alive through a long wait, calls or not.
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.http2.max_ping_strikes", 3),
        ("grpc.keepalive_permit_without_calls", 1),
        # A caller whose machine vanished frees its slot within a minute.
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.http2.max_pings_without_data", 0),
    ]


def _try_to_bind(host: str, port: int) -> None:
    """Raises OSError as the system words it; gRPC would log lines of its own and raise a RuntimeError."""
    for family, kind, protocol, _, address in socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    ):
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)


def _write_atomically(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text)
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
