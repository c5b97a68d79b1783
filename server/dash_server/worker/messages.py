"""The messages between the server and its worker, and their frames.

A frame is a 4-byte big-endian length and a msgpack body. Both ends have the same version, so the messages may change
freely. Nothing is ever pickled. Knows no gRPC and no torch.
"""

import struct
from typing import Annotated

import msgspec

from dash_runtime.config import EngineConfig, GenerationRequest, ModelFacts
from dash_runtime.decision_trace import DecisionTrace

MAX_FRAME_BYTES = 64 * 1024 * 1024
_LENGTH = struct.Struct(">I")


class WorkerConfig(msgspec.Struct, frozen=True, tag=True):
    """The first message to a worker: what to load. Goes over the socket, so that `/proc` does not show it."""

    model: str
    """`embedded`, a folder, a GGUF file or a hub id."""
    revision: str | None
    device: str
    """`auto`, `cpu`, `cuda`, `cuda:1`, …"""
    precision: str
    """The FULL action's weights: `bfloat16` or `float32`."""
    num_threads: int | None
    compile_layers: bool
    policy_file: str | None
    cache_folder: str
    engine: EngineConfig
    worker_number: int = 0
    num_workers: int = 1


class Submit(msgspec.Struct, frozen=True, tag=True):
    """Submits a request."""

    request: GenerationRequest


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """Drops a request in any state. At most Traced follows. Unknown ids are ignored."""

    request_id: str


class Stop(msgspec.Struct, frozen=True, tag=True):
    """Ends a request at a stop string: Finished with the reason `stop_string` follows. Unknown ids are ignored."""

    request_id: str


class Ping(msgspec.Struct, frozen=True, tag=True):
    """Asks for Pong, which comes before the next engine step."""


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """Tells the worker to exit at once."""


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The model is loaded and warmed up."""

    facts: ModelFacts
    model_folder: str
    """The folder with tokenizer.json and the chat template."""
    load_seconds: float


class StartupFailed(msgspec.Struct, frozen=True, tag=True):
    """The worker cannot serve, for a reason that the user can remove. It then exits."""

    description: str


class Pong(msgspec.Struct, frozen=True, tag=True):
    """The answer to Ping."""


class Logprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log probabilities at one position, in nats; `top` is best first."""

    chosen: float
    top: list[tuple[int, float]]


class Granted(msgspec.Struct, frozen=True, tag=True):
    """The request has its slot."""

    request_id: str
    policy: str
    compute_budget: float | None
    queue_seconds: float
    """Time in the worker's queue."""


class Tokens(msgspec.Struct, frozen=True, tag=True):
    """New tokens of one request."""

    request_id: str
    token_ids: list[int]
    actions: bytes = b""
    """If asked for, one byte per layer and token."""
    logprobs: list[Logprobs] | None = None


class Speculation(msgspec.Struct, frozen=True, array_like=True):
    """The drafts of one request in mode EXACT."""

    drafted_token_count: int
    accepted_token_count: int
    verification_count: int
    draft_seconds: float
    verification_seconds: float


class Finished(msgspec.Struct, frozen=True, tag=True):
    """The request is over and its slot is free."""

    request_id: str
    reason: str
    """`end_of_sequence`, `stop_token`, `length`, or `stop_string` in answer to Stop."""
    prefill_seconds: float
    decode_seconds: float
    output_token_count: int
    decode_token_count: int
    action_counts: dict[int, int]
    """By Action's number."""
    mean_cost: float
    exposed_policy_seconds: float
    """Mean per decode token."""
    speculation: Speculation | None = None
    cached_prompt_token_count: int = 0
    """Prompt tokens whose keys and values were in the prefix cache."""
    layer_action_counts: list[list[int]] = msgspec.field(default_factory=list)
    """For each layer, the decode tokens that ran it as SKIP, INT4, INT8 and FULL. Leaves out rejected drafts."""


class Traced(msgspec.Struct, frozen=True, tag=True):
    """A request's decision trace. Comes just before Finished, or after Cancel."""

    decision_trace: DecisionTrace

    @property
    def request_id(self) -> str:
        return self.decision_trace.request_id


class Refused(msgspec.Struct, frozen=True, tag=True):
    """The request is wrong. The server should have seen it, and now tells the caller."""

    request_id: str
    field: str
    description: str


Event = Granted | Tokens | Traced | Finished | Refused


class StepEvents(msgspec.Struct, frozen=True, tag=True):
    """All events of one engine step."""

    events: list[Event]


ToWorker = WorkerConfig | Submit | Cancel | Stop | Ping | Shutdown
FromWorker = Ready | StartupFailed | StepEvents | Pong

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
