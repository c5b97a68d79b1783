"""A connection that opens and resets streams as fast as it can keeps nobody else waiting."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.abuse.frames import opened_and_reset_streams
from dash_client import DashClient
from tests.server.server_harness import ServerProcess, fake_model, generation_request, server_process, write_tokens

NUM_STREAMS = 20_000
TOKEN = "ann-s-token-which-is-long-enough"


@pytest.fixture(params=["anybody", "callers with tokens"])
def server(request: pytest.FixtureRequest, tmp_path: Path, model_folder: Path) -> Iterator[ServerProcess]:
    """A server for anybody, or one that refuses the resetting connection's calls."""
    options: dict[str, object] = {}
    if request.param != "anybody":
        options["token_file"] = write_tokens(tmp_path, ann=TOKEN)
    with server_process(tmp_path, model=fake_model(model_folder), **options) as running:
        yield running


def test_the_next_caller_is_answered_within_a_second(server: ServerProcess) -> None:
    port = server.wait_for_port()
    with DashClient(f"localhost:{port}", token=TOKEN, retries=0) as client:
        client.wait_until_ready(30)
        with socket.create_connection(("127.0.0.1", port)) as connection:
            threading.Thread(target=drain, args=(connection,), daemon=True).start()
            with contextlib.suppress(ConnectionError):  # the server may close it
                message = generation_request(text="hello").SerializeToString()
                for piece in opened_and_reset_streams(message, NUM_STREAMS):
                    connection.sendall(piece)
            begin = time.monotonic()
            answers = [client.generate("ab", max_new_tokens=2).text for _ in range(3)]
            assert time.monotonic() - begin < 1
        assert answers == ["ab"] * 3
    assert len(server.log.read_text().splitlines()) < NUM_STREAMS / 10


def drain(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while connection.recv(1 << 16):
            pass
