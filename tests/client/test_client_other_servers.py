"""Unexpected servers: each causes a clear `DashError` in both clients, never gRPC's own exception."""

import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from client_colours import COLOURS, drain, generate, open_client
from fake_dash_server import HELLO, FakeDashServer, delta, finished, free_port, started
from test_client_connection import server_credentials

from dash_client import DashError, ServerError, UnavailableError, UnimplementedError

pytestmark = pytest.mark.parametrize("colour", COLOURS)


@contextlib.contextmanager
def answering(reply: bytes) -> Iterator[str]:
    """A server that sends everybody the same bytes and hangs up, on one of `localhost`'s addresses."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection, contextlib.suppress(OSError):
                        connection.recv(4096)
                        connection.sendall(reply)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


@contextlib.contextmanager
def sending(*messages: bytes) -> Iterator[str]:
    """A gRPC server that answers every call with these bytes; without bytes, it knows none of our methods."""

    class Everything(grpc.GenericRpcHandler):
        def service(self, details: Any) -> Any:
            if not messages:
                return None
            if details.method.endswith("StreamGenerate"):
                return grpc.unary_stream_rpc_method_handler(lambda request, context: iter(messages))
            return grpc.unary_unary_rpc_method_handler(lambda request, context: messages[0])

    pool = ThreadPoolExecutor(2)
    server = grpc.server(pool, handlers=[Everything()])
    port = server.add_insecure_port(f"localhost:{free_port()}")
    server.start()
    try:
        yield f"localhost:{port}"
    finally:
        server.stop(0).wait()
        pool.shutdown()


def error_of(colour: str, target: str, **options: Any) -> DashError:
    """Returns the error of a unary call, checked to equal that of a stream."""
    errors = []
    with open_client(colour, target, **{"retries": 0, **options}) as client:
        for call in (generate, drain):
            with pytest.raises(DashError) as caught:
                call(client, timeout=20)
            errors.append(caught.value)
    assert errors[0].message == errors[1].message
    assert type(errors[0]) is type(errors[1])
    return errors[0]


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n", "speaks HTTP/1"),
        (b"HTTP/1.0 505 HTTP Version Not Supported\r\n\r\n", "speaks HTTP/1|does not speak gRPC"),
        (b"220 mail.example ESMTP\r\n", "does not speak gRPC"),
    ],
)
def test_a_server_of_another_protocol(colour: str, reply: bytes, words: str) -> None:
    with answering(reply) as target:
        error = error_of(colour, target)
    assert isinstance(error, UnavailableError)
    assert any(word in error.message for word in words.split("|"))
    assert target in error.message


def test_a_proxy_that_refuses(colour: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "no_grpc_proxy", "grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    with answering(b"HTTP/1.1 405 Method Not Allowed\r\nContent-Length: 0\r\n\r\n") as proxy:
        monkeypatch.setenv("http_proxy", f"http://{proxy}")
        error = error_of(colour, "dash.example:50051")
    assert isinstance(error, UnavailableError)
    assert "proxy" in error.message


def test_a_server_that_hangs_up(colour: str) -> None:
    with answering(b"") as target:
        for name in (target, target.replace("127.0.0.1", "localhost")):
            error = error_of(colour, name)
            assert isinstance(error, UnavailableError)
            assert "tls=True" in error.message


OURS, OTHER = trustme.CA(), trustme.CA()


@pytest.mark.parametrize(
    ("credentials", "options", "words"),
    [
        (None, {"ca_file": OURS.cert_pem.bytes()}, "does not speak TLS"),
        (server_credentials(OURS), {}, "tls=True"),
        (server_credentials(OURS), {"ca_file": OTHER.cert_pem.bytes()}, "`ca_file`"),
        (server_credentials(OURS), {"tls": True}, "`ca_file`"),
        (server_credentials(OURS), {"ca_file": OURS.cert_pem.bytes(), "server_name": "other.example"}, "another name"),
        (server_credentials(OURS, asks_clients=True), {"ca_file": OURS.cert_pem.bytes()}, "certificate_file"),
    ],
    ids=["no TLS", "only TLS", "unknown authority", "not a public one", "another name", "a client's certificate"],
)
def test_what_is_wrong_with_tls_is_told(
    colour: str, credentials: grpc.ServerCredentials | None, options: dict[str, Any], words: str
) -> None:
    with FakeDashServer(credentials=credentials) as server:
        error = error_of(colour, server.target, **options)
    assert isinstance(error, UnavailableError)
    assert words in error.message


def test_no_server(gone: FakeDashServer, colour: str, tmp_path: Path) -> None:
    for target in (gone.target, f"unix:{tmp_path}/none"):
        error = error_of(colour, target)
        assert isinstance(error, UnavailableError)
        assert "make serve" in error.message
        assert target in error.message


def test_a_name_that_nobody_has(colour: str) -> None:
    error = error_of(colour, "no-such-host.invalid:50051")
    assert isinstance(error, UnavailableError)
    assert "no-such-host.invalid:50051 is not known" in error.message


def test_a_server_without_our_methods(colour: str) -> None:
    with sending() as target:
        error = error_of(colour, target)
    assert isinstance(error, UnimplementedError)
    assert "version" in error.message


@pytest.mark.parametrize("mode", [0, 99])
def test_a_mode_of_a_newer_server(colour: str, mode: int) -> None:
    with FakeDashServer([started(mode=mode), delta("x", [1]), finished()]) as server:
        error = error_of(colour, server.target)
    assert isinstance(error, ServerError)
    assert "version" in error.message


@pytest.mark.parametrize("data", [b"\xff\xff\xff", b"", HELLO[1].SerializeToString()])  # type: ignore[union-attr]
def test_answers_that_are_no_messages_of_ours(colour: str, data: bytes) -> None:
    with sending(data) as target, open_client(colour, target) as client:
        for call in (generate, drain):
            with pytest.raises(ServerError):
                call(client)
        for ask in (client.model_info, client.policy_info, lambda: client.tokenize("x"), client.health):
            with contextlib.suppress(DashError):
                ask()


SERVER = """
import sys, time
from fake_dash_server import HELLO, FakeDashServer
with FakeDashServer() as server:
    server.script = [*HELLO[:2], server.wait]
    print(server.target, flush=True)
    time.sleep(60)
"""


def test_a_server_that_dies_in_the_middle_of_a_stream(colour: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    with subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True, env=environment) as server:
        assert server.stdout is not None
        with open_client(colour, server.stdout.readline().strip()) as client:
            stream = client.stream("x")
            next(stream)
            server.kill()
            with pytest.raises(UnavailableError, match="in the middle of the answer") as caught:
                stream.final()
    assert caught.value.request_id == "r-1"
