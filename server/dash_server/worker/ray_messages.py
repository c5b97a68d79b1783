"""The messages between the server and its launcher, the process that speaks with Ray. Frames are those of workers."""

import msgspec

from dash_server.worker.messages import Shutdown


class Launch(msgspec.Struct, frozen=True, tag=True):
    """Starts a worker process somewhere on the cluster. Launched follows, and in any case Ended."""

    number: int
    """Names the start."""
    arguments: list[str]
    """Arguments for the node's Python."""
    environment: dict[str, str]
    """Added to the node's own."""
    credentials: bytes
    """Standard input of the process."""
    num_cpus: int
    num_gpus: int


class Kill(msgspec.Struct, frozen=True, tag=True):
    """Kills a worker, or takes its start back. Unknown numbers are ignored."""

    number: int


class Connected(msgspec.Struct, frozen=True, tag=True):
    """The cluster is there. The first message."""

    host: str
    """This machine's address in the cluster."""


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The cluster cannot be reached. The launcher then exits."""

    description: str


class Launched(msgspec.Struct, frozen=True, tag=True):
    """The worker process runs."""

    number: int
    pid: int
    node: str
    """The address of its node."""


class Ended(msgspec.Struct, frozen=True, tag=True):
    """The worker process has ended, or never ran."""

    number: int
    how: str


ToLauncher = Launch | Kill | Shutdown
FromLauncher = Connected | Failed | Launched | Ended

_to_launcher = msgspec.msgpack.Decoder(ToLauncher)
_from_launcher = msgspec.msgpack.Decoder(FromLauncher)


def decode_to_launcher(body: bytes) -> ToLauncher:
    """Raises msgspec.ValidationError."""
    return _to_launcher.decode(body)


def decode_from_launcher(body: bytes) -> FromLauncher:
    """Raises msgspec.ValidationError."""
    return _from_launcher.decode(body)
