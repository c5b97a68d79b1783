"""Sends absurd requests, by the ten thousand, to a real server with a tiny model, and to every method that it has.

Hypothesis generates messages of any shape that the contract allows, with any values that the wire can carry. Others are
random bytes, or good requests with bytes changed, cut off or doubled. Some peers speak no gRPC at all.
"""

import asyncio
import importlib.util
import os
import random
import socket
import ssl
import struct
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import DecodeError, Message
from h2.config import H2Configuration
from h2.connection import H2Connection
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from benchmarks.abuse import frames
from benchmarks.soak.report import Finding, finding, first_traceback
from benchmarks.soak.service import STUCK_SECONDS, Service, model_variables, running_service
from dash_api.v1 import generation_pb2, model_pb2
from tests.server.server_harness import generation_request
from tests.tiny_models import save_tiny_model

_HAS_VLLM_ENGINE = importlib.util.find_spec("smg_grpc_proto") is not None


def _methods() -> dict[str, MethodDescriptor]:
    """Returns all methods of the services that face callers, by their paths."""
    services = [*generation_pb2.DESCRIPTOR.services_by_name.values(), *model_pb2.DESCRIPTOR.services_by_name.values()]
    methods = {f"/{own.full_name}/{method.name}": method for own in services for method in own.methods}
    if _HAS_VLLM_ENGINE:
        from smg_grpc_proto.generated import vllm_engine_pb2

        engine = vllm_engine_pb2.DESCRIPTOR.services_by_name["VllmEngine"]
        served = ("Generate", "Abort", "GetModelInfo", "GetServerInfo", "GetLoads")  # those that read their message
        methods |= {f"/{engine.full_name}/{name}": engine.methods_by_name[name] for name in served}
    return methods


METHODS = _methods()
_EXPECTED = {"OK", "INVALID_ARGUMENT"}
_ALSO_EXPECTED = {"GetDecisions": "NOT_FOUND", "GetAudit": "NOT_FOUND", "Session": "DEADLINE_EXCEEDED"}
"""A session's requests have timeouts in them."""
_CODES = {code.value[0]: code.name for code in grpc.StatusCode}
_BATCH = 200
_AT_ONCE = 32

_texts = st.one_of(st.text(max_size=40), st.sampled_from(["", "\0", "é" * 300, "{{ 7 * 7 }}", "user", "system", "toy"]))
_values: dict[int, st.SearchStrategy[Any]] = {
    FieldDescriptor.TYPE_STRING: _texts,
    FieldDescriptor.TYPE_BYTES: st.binary(max_size=40),
    FieldDescriptor.TYPE_BOOL: st.booleans(),
    FieldDescriptor.TYPE_FLOAT: st.one_of(st.floats(width=32), st.sampled_from([0.0, 0.5, 1.0])),
    FieldDescriptor.TYPE_DOUBLE: st.one_of(st.floats(), st.sampled_from([0.0, 0.5, 1.0])),
    FieldDescriptor.TYPE_INT32: st.one_of(st.integers(-(2**31), 2**31 - 1), st.integers(-1, 50)),
    FieldDescriptor.TYPE_ENUM: st.one_of(st.integers(0, 5), st.integers(-(2**31), 2**31 - 1)),
    FieldDescriptor.TYPE_UINT32: st.one_of(st.integers(0, 2**32 - 1), st.integers(0, 260)),
    FieldDescriptor.TYPE_UINT64: st.integers(0, 2**64 - 1),
    FieldDescriptor.TYPE_INT64: st.integers(-(2**63), 2**63 - 1),
}
_MOST_DEPTH = 6
"""The depth of messages in messages, some of which hold their own kind."""


def messages(message_class: type[Message], depth: int = 0) -> st.SearchStrategy[Message]:
    """Returns a strategy for any message of the class: every field set or not, to any value of its type."""
    descriptor = message_class.DESCRIPTOR
    fields = {field.name: _field(field, depth) for field in descriptor.fields if depth < _MOST_DEPTH}
    return st.fixed_dictionaries({}, optional=fields).map(
        lambda values: message_class(**_one_of_each(descriptor, values))
    )


def _field(field: FieldDescriptor, depth: int) -> st.SearchStrategy[Any]:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        key, value = (_field(field.message_type.fields_by_name[name], depth) for name in ("key", "value"))
        return st.dictionaries(key, value, max_size=4)
    is_message = field.message_type is not None
    value = messages(field.message_type._concrete_class, depth + 1) if is_message else _values[field.type]
    return st.lists(value, max_size=4) if field.is_repeated else value


def _one_of_each(descriptor: Descriptor, values: dict[str, Any]) -> dict[str, Any]:
    """Drops the later members of a oneof: a message object holds one."""
    seen: set[str] = set()
    kept = {}
    for name, value in values.items():
        oneof = descriptor.fields_by_name[name].containing_oneof
        if oneof is not None and oneof.name in seen:
            continue
        if oneof is not None:
            seen.add(oneof.name)
        kept[name] = value
    return kept


def generated_requests(number: int, first_seed: int) -> list[tuple[str, bytes]]:
    """Generates requests of every method with Hypothesis."""
    made: list[tuple[str, bytes]] = []
    anything = st.sampled_from(sorted(METHODS)).flatmap(
        lambda method: messages(_class_of(method)).map(lambda message: (method, _bounded(message)))
    )

    @settings(max_examples=number, phases=[Phase.generate], database=None, deadline=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(anything)
    def collect(request: tuple[str, bytes]) -> None:
        made.append(request)

    seed(first_seed)(collect)()
    return made


def _class_of(method: str) -> type[Message]:
    return METHODS[method].input_type._concrete_class


def _bounded(message: Message) -> bytes:
    """Shortens requests that would take for ever."""
    if isinstance(message, generation_pb2.SessionRequest) and message.HasField("generate"):
        message.generate.ParseFromString(_bounded(message.generate))
    if isinstance(message, generation_pb2.GenerateRequest | generation_pb2.StreamGenerateRequest):
        stopping = message.parameters.stopping
        if stopping.max_new_tokens > 0 or not stopping.HasField("max_new_tokens"):
            stopping.max_new_tokens = max(1, stopping.max_new_tokens % 60)
    return message.SerializeToString()


def mangled_request(rng: random.Random) -> tuple[str, bytes]:
    """Returns random bytes, or a damaged good request."""
    method = rng.choice(sorted(METHODS))
    if rng.random() < 0.3:
        return method, rng.randbytes(rng.choice((1, 2, 5, 20, 200, 3000)))
    data = bytearray(generation_request(text="some text", max_new_tokens=5).SerializeToString())
    match rng.randrange(4):
        case 0:
            del data[rng.randrange(len(data)) :]
        case 1:
            for _ in range(rng.randint(1, 4)):
                data[rng.randrange(len(data))] = rng.randrange(256)
        case 2:
            data += data[rng.randrange(len(data)) :]
        case 3:
            place = rng.randrange(len(data))
            data[place:place] = rng.randbytes(rng.randint(1, 8))
    return method, bytes(data)


async def run(number: int = 200_000, first_seed: int = 1, tiny_model: Path | None = None) -> list[Finding]:
    """Sends all requests: half are generated, half are mangled."""
    with tempfile.TemporaryDirectory() as folder:
        if tiny_model is None:
            tiny_model = Path(folder) / "model"
            save_tiny_model(tiny_model, "llama")
        variables = {"log_level": "ERROR", "max_new_tokens": 64, "default_max_new_tokens": 8, "audit_rate": 0.1}
        variables |= {**model_variables(tiny_model, folder), "vllm_engine": _HAS_VLLM_ENGINE}
        async with running_service(Path(folder), **variables) as service:
            pids_before = _worker_pids(service)
            outcomes: Counter[str] = Counter()
            wrong: list[str] = []
            rng = random.Random(first_seed)
            sizes: list[int] = []
            for first in range(0, number, 2 * _BATCH):
                generated = await asyncio.to_thread(generated_requests, min(_BATCH, number), first_seed + first)
                requests = [*generated, *(mangled_request(rng) for _ in range(_BATCH))]
                await _send_all(service, requests, outcomes, wrong)
                sizes.append(service.rss_bytes())
            strangers = await _strangers(service, num_rounds=max(1, number // 1000))
            pids = _worker_pids(service)
            answer = await service.generate(generation_request(text="abc", max_new_tokens=3).parameters)
            num_tokens = len(answer.output.token_ids)
            service.server.process.terminate()
            code = await asyncio.to_thread(service.server.process.wait, 30)
            log = service.server.log.read_text()
    growth = sizes[-1] / sizes[len(sizes) // 10] - 1
    seen = ", ".join(f"{name} {count}" for name, count in sorted(outcomes.items()))
    return [
        finding(f"{sum(outcomes.values())} requests", "OK or INVALID_ARGUMENT, none else", seen,
                set(outcomes) <= _EXPECTED),
        finding("undecodable ones that were not INVALID_ARGUMENT", "none", wrong[:3] or "none", not wrong),
        finding("memory after the first tenth", "< 5 % more", f"{growth:+.1%}", growth < 0.05),
        finding("peers that speak no gRPC, and broken frames", "each connection over, none kept", *strangers),
        finding("afterwards: an answer's tokens, a worker that never died, exit code, tracebacks", "1 to 3, yes, 0, 0",
                f"{num_tokens}, {pids == pids_before}, {code}, {log.count('Traceback')}{first_traceback(log)}",
                1 <= num_tokens <= 3 and pids == pids_before and code == 0 and "Traceback" not in log
                and "is lost" not in log),
    ]  # fmt: skip


async def _send_all(
    service: Service, requests: list[tuple[str, bytes]], outcomes: Counter[str], wrong: list[str]
) -> None:
    limit = asyncio.Semaphore(_AT_ONCE)

    async def one(method: str, data: bytes) -> None:
        async with limit:
            code = await _code(service, method, data)
        outcomes["OK" if code == _ALSO_EXPECTED.get(METHODS[method].name) else code] += 1
        if not _is_decodable(_class_of(method), data) and code != "INVALID_ARGUMENT":
            wrong.append(f"{method} {data[:40].hex()} {code}")

    await asyncio.gather(*(one(*request) for request in requests))


def _worker_pids(service: Service) -> list[int]:
    return [process.pid for process in service.server.workers()]


async def _code(service: Service, method: str, data: bytes) -> str:
    if METHODS[method].server_streaming:
        if METHODS[method].client_streaming:
            stream = service.channel.stream_stream(method)(iter([data]), timeout=STUCK_SECONDS)
        else:
            stream = service.channel.unary_stream(method)(data, timeout=STUCK_SECONDS)
        failed = set()
        try:
            async for data in stream:
                if METHODS[method].client_streaming:
                    events = generation_pb2.SessionResponse.FromString(data).events
                    failed |= {_CODES[event.error.code] for event in events if event.HasField("error")}
        except grpc.aio.AioRpcError as error:
            return str(error.code().name)
        return min(failed, default="OK")
    return str((await service.channel.unary_unary(method)(data, timeout=STUCK_SECONDS).code()).name)


def _is_decodable(message_class: type[Message], data: bytes) -> bool:
    try:
        message_class.FromString(data)
    except DecodeError:
        return False
    return True


async def _strangers(service: Service, num_rounds: int) -> tuple[str, bool]:
    """Checks that other protocols and broken frames end their connection and leave no descriptor open."""
    talks: list[Callable[[int, int], None]] = [_http_1, _tls, _noise, _truncated_frame, _truncated_message]
    before = service.num_files()
    for number in range(num_rounds):
        await asyncio.gather(*(asyncio.to_thread(talk, service.port, number) for talk in talks))
    deadline = time.monotonic() + 20
    while (after := service.num_files()) > before and time.monotonic() < deadline:
        await asyncio.sleep(0.2)
    return f"{num_rounds} rounds of {len(talks)}, {before} files before, {after} after", after <= before


def _exchange(port: int, data: bytes) -> bytes:
    """Sends, closes its half and reads a little, as far as the other side allows."""
    with socket.create_connection(("127.0.0.1", port), timeout=5) as peer:
        try:
            peer.sendall(data)
            peer.shutdown(socket.SHUT_WR)
            return peer.recv(4096)
        except OSError:
            return b""


def _http_1(port: int, number: int) -> None:
    _exchange(port, b"POST /dash_api.v1.GenerationService/Generate HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc")


def _tls(port: int, number: int) -> None:
    context = ssl.create_default_context()
    with socket.create_connection(("127.0.0.1", port), timeout=5) as peer:
        try:
            context.wrap_socket(peer, server_hostname="localhost")
        except OSError:
            return
    raise AssertionError("a port without TLS shook hands")


def _noise(port: int, number: int) -> None:
    _exchange(port, os.urandom(number % 2000))


def _truncated_frame(port: int, number: int) -> None:
    """Returns a HEADERS frame that promises more bytes than follow."""
    beginning = frames.PREFACE + frames.frame(frames.SETTINGS, 0, 0)
    _exchange(port, beginning + struct.pack(">I", 5000)[1:] + b"\1\4\0\0\0\1" + os.urandom(number % 100))


def _truncated_message(port: int, number: int) -> None:
    """Returns a call whose only message is shorter than its prefix says."""
    connection = H2Connection(H2Configuration(client_side=True))
    connection.initiate_connection()
    connection.send_headers(1, frames.call_headers(frames.GENERATE))
    connection.send_data(1, frames.prefixed(b"abc", 100 + number), end_stream=True)
    _exchange(port, connection.data_to_send())
