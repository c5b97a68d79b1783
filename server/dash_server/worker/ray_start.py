"""Starts workers on a Ray cluster: Ray finds a node for each, and each connects back to the server by itself.

Imports no Ray: a process of its own, the launcher, speaks with it. Knows no requests.
"""

import asyncio
import itertools
import logging
import sys
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

import msgspec

from dash_server.worker.listener import WorkerListener, is_loopback
from dash_server.worker.process import FramedProcess
from dash_server.worker.ray_messages import (
    Connected,
    Ended,
    Failed,
    FromLauncher,
    Kill,
    Launch,
    Launched,
    decode_from_launcher,
)
from dash_server.worker.remote_worker import RemoteProcess, RemoteWorker
from dash_server.worker.starter import WorkerDeath, WorkerStartError

logger = logging.getLogger(__name__)

_LAUNCHER = (sys.executable, "-m", "dash_server.worker.ray_launcher")
_CONNECT_SECONDS = 60.0
_RETRY_SECONDS = 2.0
_FORWARDED = ("DASH_", "OTEL_")
_SECRETS = ("TOKEN", "HEADERS", "KEY", "SECRET", "PASSWORD", "CERTIFICATE")


@dataclass(frozen=True, slots=True)
class RayPlaces:
    """Where workers run, and how they find back."""

    address: str
    """`auto`, `host:port` or `ray://host:port`."""
    num_cpus: int
    """CPUs that each worker reserves; Ray makes them its OMP_NUM_THREADS."""
    num_gpus: int
    host: str | None
    """The address that workers connect to; None for this machine's in the cluster."""
    port: int
    certificate: tuple[Path, Path] | None
    """Files of the server's certificate chain and key; None for no TLS."""
    allow_plaintext: bool


class RayStarter:
    """A `WorkerStarter` of processes on a Ray cluster."""

    def __init__(self, places: RayPlaces, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        """Has each node's Python run `arguments`, with what is not secret of `environment`."""
        self._places = places
        self._arguments = arguments
        self._environment = forwarded(environment)
        self._numbers = itertools.count(1)
        self._starts: dict[int, RemoteProcess] = {}
        self._connecting = asyncio.Lock()
        self._launcher: FramedProcess[FromLauncher] | None = None
        self._host: str | None = None
        """This machine's address in the cluster, once it was there."""
        self._reading: asyncio.Task[None] | None = None
        self._listener: WorkerListener | None = None

    async def start(self, tell: Callable[[str], None]) -> RemoteWorker:
        places = self._places
        launcher = await self._connected(tell)
        listener = self._listening()
        number = next(self._numbers)
        self._starts[number] = start = RemoteProcess()
        gpus = f" and {places.num_gpus} GPU" if places.num_gpus else ""
        tell(f"waiting for a place on the Ray cluster, with {places.num_cpus} CPUs{gpus}")
        try:
            with listener.expect() as expected:
                launcher.send(
                    Launch(
                        number,
                        [*self._arguments, "--connect", listener.address],
                        self._environment,
                        msgspec.msgpack.encode(expected.credentials),
                        places.num_cpus,
                        places.num_gpus,
                    )
                )
                either: set[asyncio.Future] = {expected.connection, start.ended}
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
                if not expected.connection.done():
                    raise WorkerDeath(f"it ended before it was connected, see Ray's log of it: {start.ended.result()}")
                return RemoteWorker(expected.connection.result(), start, lambda: self._kill(number))
        except BaseException:
            self._kill(number)
            raise

    async def close(self) -> None:
        if self._listener is not None:
            await self._listener.close()
        if self._launcher is not None:
            await self._launcher.stop()
        if self._reading is not None:
            await asyncio.wait([self._reading])

    def _kill(self, number: int) -> None:
        if self._launcher is not None:
            self._launcher.send(Kill(number))

    async def _connected(self, tell: Callable[[str], None]) -> FramedProcess[FromLauncher]:
        """Returns the launcher, started anew if it ended. A cluster that was there once is waited for.

        Raises:
            WorkerStartError: the cluster cannot be reached for the first time.
        """
        is_told = False
        async with self._connecting:
            while self._launcher is None:
                try:
                    await self._connect()
                except WorkerStartError as error:
                    if self._host is None:
                        raise
                    if not is_told:
                        logger.warning("%s; trying until it is there again", error)
                    is_told = True
                    tell(f"waiting for the Ray cluster at {self._places.address}")
                    await asyncio.sleep(_RETRY_SECONDS)
            return self._launcher

    async def _connect(self) -> None:
        launcher = await FramedProcess.spawn((*_LAUNCHER, "--address", self._places.address), decode_from_launcher)
        messages = launcher.messages()
        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                first = await anext(messages, None)
            match first:
                case Connected(host=host):
                    self._host = host
                case Failed(description=description):
                    raise WorkerStartError(self._complaint(description), is_for_user=True)
                case _:
                    raise WorkerStartError(self._complaint("Ray's library ended, see above"), is_for_user=True)
        except TimeoutError:
            await launcher.stop()
            description = f"there is no answer within {_CONNECT_SECONDS:g} s"
            raise WorkerStartError(self._complaint(description), is_for_user=True) from None
        except BaseException:
            await launcher.stop()
            raise
        self._launcher = launcher
        self._reading = asyncio.create_task(self._read(launcher, messages))

    def _complaint(self, description: str) -> str:
        return f"DASH_RAY_ADDRESS: cannot connect to the Ray cluster at {self._places.address}: {description}"

    async def _read(self, launcher: FramedProcess[FromLauncher], messages: AsyncGenerator[FromLauncher, None]) -> None:
        async with aclosing(messages):
            async for message in messages:
                match message:
                    case Launched(number=number, pid=pid, node=node) if number in self._starts:
                        self._starts[number].name = f"worker {pid} on {node}"
                    case Ended(number=number, how=how) if number in self._starts:
                        self._starts.pop(number).ended.set_result(how)
        # Workers end with their actors, and those with the launcher, as soon as the cluster notices.
        self._launcher = None
        for start in self._starts.values():
            start.ended.set_result("the connection to the Ray cluster is lost")
        self._starts.clear()
        status = await launcher.stop()
        logger.info("the launcher of Ray's workers ended: %s", status)

    def _listening(self) -> WorkerListener:
        """Returns the port for workers. Raises WorkerStartError if it cannot or may not be opened."""
        if self._listener is not None:
            return self._listener
        places, host = self._places, self._places.host or self._host
        assert host is not None
        try:
            if places.certificate is None and not places.allow_plaintext and not is_loopback(host):
                raise WorkerStartError(
                    f"DASH_WORKER_HOST: workers connect to {host} over a network, and without TLS everybody on it "
                    "reads along; set DASH_TLS_CERTIFICATE_FILE and DASH_TLS_KEY_FILE, or DASH_ALLOW_PLAINTEXT=true",
                    is_for_user=True,
                )
            self._listener = WorkerListener(host, places.port, places.certificate)
        except OSError as error:
            raise WorkerStartError(
                f"DASH_WORKER_HOST, DASH_WORKER_PORT: cannot listen for workers on {host}, port {places.port}: "
                f"{error.strerror or error}",
                is_for_user=True,
            ) from None
        logger.info("listening for workers on %s", self._listener.address)
        return self._listener


def forwarded(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the variables that workers get too: ours and OpenTelemetry's, without any that may hold a secret."""
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(_FORWARDED) and not any(word in name for word in _SECRETS)
    }
