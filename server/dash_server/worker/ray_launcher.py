"""The launcher process: speaks with Ray for the server. Started as `python -m dash_server.worker.ray_launcher`.

Ray's library ends its process when the cluster's control store stays away (60 s, unless it is set otherwise), and
brings threads and signal handlers of its own: the server must not share a process with it. Knows no requests and no
tokens; workers connect to the server by themselves.
"""

import argparse
import asyncio
import contextlib
import logging
import os
import socket
import sys
from typing import Any

from dash_runtime.child_process import die_with_parent
from dash_server.logs import configure_worker_logging
from dash_server.worker.messages import FrameReader, Shutdown, encode_frame
from dash_server.worker.ray_actor import WorkerActor
from dash_server.worker.ray_messages import (
    Connected,
    Ended,
    Failed,
    FromLauncher,
    Kill,
    Launch,
    Launched,
    decode_to_launcher,
)

logger = logging.getLogger("dash_server.worker")

_READ_BYTES = 1 << 16
_MAX_REASON = 200
_RETRY_SECONDS = 1.0
_CONNECT_SECONDS = 5.0


class Launcher:
    """Keeps an actor for each worker."""

    def __init__(self, ray: Any, writer: asyncio.StreamWriter) -> None:
        self._ray = ray
        self._writer = writer
        self._actors: dict[int, Any] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(self, reader: asyncio.StreamReader) -> None:
        """Does what the server asks, until it is gone or sends Shutdown. Then kills what is left."""
        frames = FrameReader()
        while data := await reader.read(_READ_BYTES):
            for message in map(decode_to_launcher, frames.feed(data)):
                match message:
                    case Launch():
                        self._begin(self._launch(message))
                    case Kill(number=number) if number in self._actors:
                        self._begin(self._kill(self._actors[number]))
                    case Shutdown():
                        return

    def tell(self, message: FromLauncher) -> None:
        self._writer.write(encode_frame(message))

    def _begin(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _launch(self, launch: Launch) -> None:
        # Nothing is restarted by Ray: the server does it, with new credentials.
        options = {"num_cpus": launch.num_cpus, "num_gpus": launch.num_gpus, "scheduling_strategy": "SPREAD"}
        actor_class = self._ray.remote(WorkerActor).options(**options, max_restarts=0)
        actor = actor_class.remote(launch.arguments, launch.environment, launch.credentials)
        self._actors[launch.number] = actor
        try:
            self.tell(Launched(launch.number, *await actor.place.remote()))
            how = f"status {await self._wait(actor)}"
        except self._ray.exceptions.RayError as error:
            how = f"its Ray actor is lost: {_one_line(error)}"
        del self._actors[launch.number]
        self.tell(Ended(launch.number, how))
        await self._kill(actor)

    async def _wait(self, actor: Any) -> int:
        while True:
            try:
                return await actor.wait.remote()
            except self._ray.exceptions.ActorUnavailableError:  # it may only be out of reach: its worker goes on
                await asyncio.sleep(_RETRY_SECONDS)

    async def _kill(self, actor: Any) -> None:
        # Waits for the control store, which may be away.
        await asyncio.to_thread(self._ray.kill, actor)


def main() -> int:
    """Serves the server at the other end of the socket; returns the exit code."""
    parser = argparse.ArgumentParser(description="A process of dash-server; not for use by hand.")
    parser.add_argument("--address", required=True, help="the Ray cluster")
    parser.add_argument("--fd", type=int, required=True, help="file descriptor of the socket to the server")
    given = parser.parse_args()
    die_with_parent()
    configure_worker_logging()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    return asyncio.run(_serve(given.address, socket.socket(fileno=given.fd)))


async def _serve(address: str, server: socket.socket) -> int:
    reader, writer = await asyncio.open_unix_connection(sock=server)
    import ray

    launcher = Launcher(ray, writer)
    try:
        _try_to_connect(address)
        # Workers log where Ray's workers do, on their nodes: forwarded lines would mix with the server's own.
        ray.init(address=address, log_to_driver=False, configure_logging=False, logging_level=logging.ERROR)
    except Exception as error:  # Ray raises ConnectionError, ValueError, RuntimeError and more
        launcher.tell(Failed(_one_line(error)))
        with contextlib.suppress(ConnectionError):
            await writer.drain()
        return 2
    launcher.tell(Connected(ray.util.get_node_ip_address()))
    try:
        await launcher.serve(reader)
    finally:
        ray.shutdown()  # ends the actors, too
    return 0


def _try_to_connect(address: str) -> None:
    """Raises OSError if nothing listens there: Ray's library would try for a minute."""
    if address != "auto":
        host, _, port = address.removeprefix("ray://").rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:_MAX_REASON]


if __name__ == "__main__":
    sys.exit(main())
