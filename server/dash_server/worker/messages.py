"""The messages between the server and its worker, and their frames.

A frame is a 4-byte big-endian length and a msgpack body. Both ends have the same version, so the messages may change
freely. Nothing is ever pickled. Knows no gRPC and no torch.
"""

import struct
from typing import Annotated

import msgspec

from dash_runtime.config import EngineConfig, GenerationRequest, ModelFacts
from dash_runtime.events import CostStatus, EngineEvent

MAX_FRAME_BYTES = 64 * 1024 * 1024
_LENGTH = struct.Struct(">I")


class WorkerConfig(msgspec.Struct, frozen=True, tag=True):
    """The first message to a worker: what to load. Goes over the socket, so that `/proc` does not show it."""

    model: str
    """`embedded`, a folder, a GGUF file or a hub id."""
    revision: str | None
    devices: tuple[str, ...]
    """One of `auto`, `cpu`, `cuda`, `cuda:1`, …; or several that share the layers."""
    precision: str
    """The FULL action's weights: `bfloat16` or `float32`."""
    num_threads: int | None
    native_code: str
    """`auto`, `build` or `off`."""
    actions: tuple[str, ...] | None
    """The names of the actions to offer; None: what fits well into the memory that is free."""
    weights: str
    """`mapped` or `copied`."""
    checks_costs: bool
    policy_file: str | None
    cache_folder: str
    engine: EngineConfig
    serves_first: bool
    """True if what nobody measured yet is measured once the worker serves."""
    use_graphs: bool = True
    """False once a worker on this device could not make one."""
    worker_number: int = 0
    num_workers: int = 1


class Submit(msgspec.Struct, frozen=True, tag=True):
    """Submits a request."""

    request: GenerationRequest


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """Drops a request in any state. At most SequenceCancelled follows. Unknown ids are ignored."""

    request_id: str


class Stop(msgspec.Struct, frozen=True, tag=True):
    """Ends a request at a stop string: SequenceFinished follows. Unknown ids are ignored."""

    request_id: str


class Ping(msgspec.Struct, frozen=True, tag=True):
    """Asks for Pong, which comes before the next engine step, or between the layers of a long one."""


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """Tells the worker to exit at once."""


class Starting(msgspec.Struct, frozen=True, tag=True):
    """The work of a worker that is not ready yet, in one sentence."""

    doing: str


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The model is loaded and warmed up."""

    facts: ModelFacts
    model_folder: str
    """The folder with tokenizer.json and the chat template."""
    load_seconds: float


class GraphsFailed(msgspec.Struct, frozen=True, tag=True):
    """The device could not make a graph. The worker ends, since the device's memory may be in disorder.

    The next one has to do without."""

    description: str


class StartupFailed(msgspec.Struct, frozen=True, tag=True):
    """The worker cannot serve, for a reason that the user can remove. It then exits."""

    description: str


class Pong(msgspec.Struct, frozen=True, tag=True):
    """A sign of life: the answer to Ping, or unasked in the middle of a long step."""


class StepEvents(msgspec.Struct, frozen=True, tag=True):
    """All events of one engine step."""

    events: list[EngineEvent]


class CostsJudged(msgspec.Struct, frozen=True, tag=True):
    """The cost table has been compared with what steps take, and something is new. Budgets in the facts follow it."""

    status: CostStatus
    facts: ModelFacts


ToWorker = WorkerConfig | Submit | Cancel | Stop | Ping | Shutdown
FromWorker = Starting | Ready | StartupFailed | GraphsFailed | StepEvents | CostsJudged | Pong

_encoder = msgspec.msgpack.Encoder()
_to_worker = msgspec.msgpack.Decoder(ToWorker)
_from_worker = msgspec.msgpack.Decoder(FromWorker)


def encode_frame(message: Annotated[object, "ToWorker or FromWorker"]) -> bytes:
    """Returns the message's frame."""
    body = _encoder.encode(message)
    return _LENGTH.pack(len(body)) + body


class FrameReader:
    """Splits a byte stream into frames. Raises ValueError for a frame over MAX_FRAME_BYTES."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Returns the bodies that `data` completes, in order."""
        self._buffer += data
        bodies: list[bytes] = []
        start = 0
        while len(self._buffer) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer, start)
            if length > MAX_FRAME_BYTES:
                raise ValueError(f"a frame of {length} bytes exceeds the limit of {MAX_FRAME_BYTES}")
            end = start + _LENGTH.size + length
            if len(self._buffer) < end:
                break
            bodies.append(bytes(self._buffer[start + _LENGTH.size : end]))
            start = end
        del self._buffer[:start]
        return bodies


def decode_to_worker(body: bytes) -> ToWorker:
    """Raises msgspec.ValidationError, or the error of the message's own validation."""
    return _to_worker.decode(body)


def decode_from_worker(body: bytes) -> FromWorker:
    """Raises msgspec.ValidationError."""
    return _from_worker.decode(body)
