"""Opens and drops connections by the thousand, and pings as often as the server allows."""

import asyncio
import tempfile
from pathlib import Path

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import ConnectionTerminated, PingAckReceived

from benchmarks.soak.report import Finding, finding
from benchmarks.soak.service import Service, running_service
from tests.server.server_harness import FAKE_WORKER, fake_model, generation_request, open_channel, write_model_folder

_AT_ONCE = 50
_PING_SECONDS = 10.0
"""The server's `grpc.http2.min_ping_interval_without_data_ms`."""


async def run(num_connections: int = 10_000, num_pings: int = 6) -> list[Finding]:
    """Runs the part against a server with the fake worker."""
    with tempfile.TemporaryDirectory() as folder:
        model = fake_model(write_model_folder(Path(folder) / "model"), token_seconds=0.002)
        async with running_service(Path(folder), worker_command=FAKE_WORKER, model=model) as service:
            pings = asyncio.create_task(_ping(service.port, num_pings))
            await service.generate(generation_request(text="abc", max_new_tokens=3).parameters)
            await _open_and_drop(service, 4 * _AT_ONCE)  # the first ones allocate what stays
            files_before, memory_before = service.num_files(), service.rss_bytes()
            await _open_and_drop(service, num_connections)
            num_answered, num_goaways = await pings
            await asyncio.sleep(2)
            files_after, memory_after = service.num_files(), service.rss_bytes()
            answer = await service.generate(generation_request(text="abc", max_new_tokens=3).parameters)
            log = service.server.log.read_text()
    growth = memory_after / memory_before - 1
    return [
        finding(f"files of the server around {num_connections} connections", "no more than before",
                f"{files_before} before, {files_after} after", files_after <= files_before),
        finding("memory around them", "< 10 % more", f"{growth:+.1%}", growth < 0.1),
        finding(f"pings of {num_pings}, one every {_PING_SECONDS:g} s without a call", "all answered, no GOAWAY",
                f"{num_answered} answered, {num_goaways} GOAWAY", (num_answered, num_goaways) == (num_pings, 0)),
        finding("an answer afterwards, and tracebacks in the log", "abc, 0",
                f"{answer.output.text}, {log.count('Traceback')}",
                answer.output.text == "abc" and "Traceback" not in log),
    ]  # fmt: skip


async def _open_and_drop(service: Service, number: int) -> None:
    limit = asyncio.Semaphore(_AT_ONCE)

    async def one(place: int) -> None:
        async with limit:
            if place % 10 == 0:
                await _drop_in_a_call(service.port)
                return
            reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
            # Dropped before a word, after half a preface, and after a whole one.
            preface = _client_preface()
            writer.write(preface[: (0, 10, len(preface))[place % 3]])
            if place % 2:
                await reader.read(9)
            writer.transport.abort() if place % 5 == 0 else writer.close()

    await asyncio.gather(*map(one, range(number)))


async def _drop_in_a_call(port: int) -> None:
    """Closes a channel while its stream runs."""
    async with open_channel(port) as channel:
        call = channel.unary_stream("/dash_api.v1.GenerationService/StreamGenerate")(
            generation_request(text="abc", max_new_tokens=2000).SerializeToString()
        )
        await call.read()


def _client_preface() -> bytes:
    connection = H2Connection(H2Configuration(client_side=True))
    connection.initiate_connection()
    return connection.data_to_send()


async def _ping(port: int, number: int) -> tuple[int, int]:
    """Returns the number of acknowledged pings and of GOAWAY frames on one idle connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    connection = H2Connection(H2Configuration(client_side=True))
    connection.initiate_connection()
    writer.write(connection.data_to_send())
    num_acknowledged = num_goaways = 0
    for count in range(number + 1 if number else 0):
        if count:
            connection.ping(count.to_bytes(8, "big"))
        writer.write(connection.data_to_send())
        try:
            async with asyncio.timeout(_PING_SECONDS + 0.1):
                while data := await reader.read(65536):
                    for event in connection.receive_data(data):
                        num_acknowledged += isinstance(event, PingAckReceived)
                        num_goaways += isinstance(event, ConnectionTerminated)
                    writer.write(connection.data_to_send())
        except TimeoutError:
            pass
    writer.close()
    return num_acknowledged, num_goaways
