"""Workers that connect over TCP: who is let in, and that all else is as with a local one. Real sockets, no Ray."""

import asyncio
import secrets
import signal
import socket
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import psutil
import pytest
import trustme

from dash_server.worker.handshake import ANSWER_BYTES, Credentials, HandshakeError, WorkerHandshake
from dash_server.worker.listener import WorkerListener
from dash_server.worker.messages import Ping, Pong, encode_frame
from dash_server.worker.ray_start import forwarded
from dash_server.worker.server_socket import ServerGone, connect, receive, send
from tests.server import fake_worker
from tests.server.server_harness import fake_model, running_server
from tests.server.tcp_starter import TcpStarter
from tests.server.test_lifecycle import code_of, first_delta
from tests.server.test_workers import worker_pids

FAKE = (fake_worker.__file__,)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for a name under which no worker connects, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    issued = trustme.CA().issue_cert("front.example")
    for name, blob in (("chain.pem", issued.cert_chain_pems[0]), ("key.pem", issued.private_key_pem)):
        blob.write_to_path(folder / name)
    return folder / "chain.pem", folder / "key.pem"


@asynccontextmanager
async def open_listener(certificate: tuple[Path, Path] | None = None) -> AsyncIterator[WorkerListener]:
    listener = WorkerListener("127.0.0.1", 0, certificate, handshake_seconds=0.3)
    try:
        yield listener
    finally:
        await listener.close()


def place_of(listener: WorkerListener) -> tuple[str, int]:
    host, _, port = listener.address.rpartition(":")
    return host, int(port)


async def connected(listener: WorkerListener, credentials: Credentials) -> socket.socket:
    return await asyncio.to_thread(connect, *place_of(listener), credentials)


async def is_closed(listener: WorkerListener, *sent: bytes) -> bool:
    """Sends bytes to the listener, and returns whether it then closes the connection without a handshake's proof."""
    reader, writer = await asyncio.open_connection(*place_of(listener))
    for data in sent:
        writer.write(data)
    async with asyncio.timeout(5):
        rest = await reader.read()
    writer.close()
    return len(rest) <= ANSWER_BYTES


@pytest.mark.parametrize("has_tls", [False, True])
async def test_a_worker_with_the_secret_gets_messages_both_ways(has_tls: bool, certificate: tuple[Path, Path]) -> None:
    async with open_listener(certificate if has_tls else None) as listener:
        with listener.expect() as expected:
            worker = await connected(listener, expected.credentials)
            server = await expected.connection
        assert isinstance(worker, ssl.SSLSocket) == has_tls
        with worker:
            server.send(Ping())
            assert receive(worker, 5) == encode_frame(Ping())
            assert receive(worker, 0) == b""
            send(worker, encode_frame(Pong()) * 2)
            messages = server.messages()
            assert [await anext(messages), await anext(messages)] == [Pong(), Pong()]
            server.abort()
            assert await anext(messages, None) is None
            with pytest.raises(ServerGone):
                await asyncio.to_thread(receive, worker, 5)


async def test_a_wrong_secret_is_refused_by_both_ends(caplog: pytest.LogCaptureFixture) -> None:
    async with open_listener() as listener:
        with listener.expect() as expected:
            wrong = replace_secret(expected.credentials)
            with pytest.raises(HandshakeError, match="does not have this start's secret"):
                await connected(listener, wrong)
            # One that does not check the server's proof gets no further.
            handshake = WorkerHandshake(wrong)
            assert await is_closed(listener, handshake.hello(), secrets.token_bytes(32))
            assert not expected.connection.done()
            # And the right one is still welcome.
            (await connected(listener, expected.credentials)).close()
            (await expected.connection).abort()
    lines = [record.message for record in caplog.records if "workers' port" in record.message]
    assert len(lines) == 2
    assert "it does not have the secret of the start that it names" in lines[1]
    assert expected.credentials.secret.hex() not in caplog.text


def replace_secret(credentials: Credentials) -> Credentials:
    return Credentials(credentials.start_id, secrets.token_bytes(32), credentials.certificate)


async def test_a_start_that_is_over_and_a_second_worker_of_a_start_are_refused(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with open_listener() as listener:
        with listener.expect() as old:
            pass
        with listener.expect() as expected:
            with pytest.raises(HandshakeError, match="closed the connection"):
                await connected(listener, old.credentials)
            first = await connected(listener, expected.credentials)
            await expected.connection
            second = await connected(listener, expected.credentials)
            with pytest.raises(ServerGone):
                await asyncio.to_thread(receive, second, 5)
        first.close()
        second.close()
        (await expected.connection).abort()
    assert "it names a start that is over, or never was" in caplog.text
    assert "the worker of this start is connected already" in caplog.text


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (b"", "did not say who it is in time"),
        (b"dash-worker/1 ", "did not say who it is in time"),
        (b"GET / HTTP/1.1\r\nHost: somewhere\r\n" + b"x" * 100, "does not speak as a worker"),
        (encode_frame(Pong()) * 40, "does not speak as a worker"),
    ],
)
async def test_whoever_is_no_worker_is_closed_soon_with_one_line(
    sent: bytes, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_listener() as listener:
        started = time.monotonic()
        assert await is_closed(listener, sent)
        assert time.monotonic() - started < 2
    lines = [record.message for record in caplog.records]
    assert len(lines) == 1
    assert reason in lines[0]


async def test_a_plain_connection_to_a_port_with_tls_is_closed_with_one_line(
    certificate: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    async with open_listener(certificate) as listener:
        assert await is_closed(listener, b"dash-worker/1 " + b"x" * 100)
    assert [record.message.partition("closed: ")[2] for record in caplog.records] == ["its TLS handshake failed"]


async def test_a_worker_takes_no_other_certificate_than_its_start_named(
    certificate: tuple[Path, Path], tmp_path: Path
) -> None:
    other = trustme.CA().issue_cert("front.example")
    other.cert_chain_pems[0].write_to_path(tmp_path / "chain.pem")
    other.private_key_pem.write_to_path(tmp_path / "key.pem")
    async with open_listener(certificate) as listener:
        with listener.expect() as expected:
            async with open_listener((tmp_path / "chain.pem", tmp_path / "key.pem")) as impostor:
                with pytest.raises(HandshakeError, match="another certificate"):
                    await connected(impostor, expected.credentials)


async def test_a_worker_does_not_prove_itself_to_a_server_without_the_secret() -> None:
    with socket.create_server(("127.0.0.1", 0)) as impostor:
        credentials = Credentials(secrets.token_bytes(16), secrets.token_bytes(32))
        connecting = asyncio.create_task(asyncio.to_thread(connect, *impostor.getsockname(), credentials))
        peer, _ = await asyncio.to_thread(impostor.accept)
        with peer:
            peer.sendall(secrets.token_bytes(ANSWER_BYTES))
            with pytest.raises(HandshakeError):
                await connecting
            assert len(peer.recv(1 << 10) + peer.recv(1 << 10)) == len(WorkerHandshake(credentials).hello())


@pytest.mark.parametrize("has_tls", [False, True])
async def test_a_server_with_workers_over_tcp_serves_cancels_and_replaces(
    has_tls: bool, certificate: tuple[Path, Path], model_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    starter = TcpStarter(FAKE, certificate if has_tls else None)
    model = fake_model(model_folder, token_seconds=0.005)
    async with running_server(model, starter=starter, slots=2, worker_timeout_seconds=1) as server:
        assert (await server.generate(text="abc", max_new_tokens=3)).output.text == "abc"
        call = server.stream(text="abc", max_new_tokens=900)
        await first_delta(call)
        call.cancel()
        await server.wait_for_live_requests(0)
        (worker,) = map(psutil.Process, worker_pids())
        call = server.stream(text="abc", max_new_tokens=900)
        await first_delta(call)
        worker.send_signal(signal.SIGSTOP)
        assert await code_of(call) is grpc.StatusCode.UNAVAILABLE
        await asyncio.to_thread(worker.wait, 5)
        await server.wait_until_serving()
        assert (await server.generate(text="abc", max_new_tokens=3)).output.text == "abc"
    assert worker_pids() == []
    assert "DASH_WORKER_TIMEOUT_SECONDS" in caplog.text


async def test_a_worker_over_tcp_ends_when_its_server_is_gone(model_folder: Path) -> None:
    async with open_listener() as listener:
        starter = TcpStarter(FAKE)
        starter.listener = listener
        worker = await starter.start(print)
        try:
            (process,) = map(psutil.Process, worker_pids())
            worker._connection.abort()
            await asyncio.to_thread(process.wait, 5)
        finally:
            await worker.stop()


def test_what_workers_elsewhere_get_of_the_environment_holds_no_secret() -> None:
    given = {
        "DASH_LOG_FORMAT": "json",
        "OTEL_SERVICE_NAME": "x",
        "DASH_TOKEN": "s",
        "DASH_TOKEN_FILE": "s",
        "DASH_TLS_KEY_FILE": "s",
        "OTEL_EXPORTER_OTLP_HEADERS": "s",
        "OTEL_EXPORTER_OTLP_TRACES_HEADERS": "s",
        "AWS_SECRET_ACCESS_KEY": "s",
        "PATH": "s",
    }
    assert forwarded(given) == {"DASH_LOG_FORMAT": "json", "OTEL_SERVICE_NAME": "x"}
